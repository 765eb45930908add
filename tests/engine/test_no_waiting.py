"""The plain engine's step runs on fake tensors, which have shapes and no values.

So whatever would make the host wait for a device to learn a number (`item`, an `if` on a tensor) raises here.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatrain.base.device import Device
from megatrain.engine.api import ENGINE, Parts, Precision
from megatrain.nn.batch import Batch
from megatrain.parallel.mesh import Mesh
from tests.engine.toy import MODEL, OPTIMIZER, SEQ_LEN, VOCABULARY

PRECISIONS = [Precision(), Precision(compute="bf16"), Precision(compute="bf16", parameters="bf16")]


def fake_batch() -> Batch:
    names = {"tokens": torch.int64, "targets": torch.int64, "positions": torch.int64, "documents": torch.int32}
    tensors = {name: torch.zeros(4, SEQ_LEN, dtype=dtype) for name, dtype in names.items()}
    return Batch(weights=torch.ones(4, SEQ_LEN), most_documents=1, **tensors)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p.compute}-{p.parameters}")
def test_a_step_waits_for_no_number(precision):
    with FakeTensorMode():
        model = MODEL.build(n_valid=VOCABULARY, seq_len=SEQ_LEN)
        model.to = lambda device: model  # it is there, and fake parameters cannot be moved
        engine = ENGINE["plain"]().build(Parts(model, OPTIMIZER, Mesh(), Device("cpu"), precision, 2, 0))
        for _ in range(2):
            report = engine.step(fake_batch(), 1e-2)
        engine.evaluate(fake_batch())
        with pytest.raises(DataDependentOutputException):  # it would be seen
            float(report.loss)
