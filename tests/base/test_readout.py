import torch

from megatrain.base.readout import Readout


def test_numbers_come_in_the_order_given_as_plain_floats():
    numbers = Readout(torch.tensor(2.5, requires_grad=True), torch.tensor(0.25, dtype=torch.bfloat16), torch.tensor(3))
    assert numbers.values() == [2.5, 0.25, 3.0]
    assert all(type(x) is float for x in numbers.values())


def test_numbers_are_those_of_their_step_whatever_happens_to_the_tensors_after():
    loss = torch.tensor(1.0)
    numbers = Readout(loss)
    loss.fill_(9.0)
    assert numbers.values() == [1.0]
