"""Long work says how far it is, where no one watches too."""

import re

from megatrain.cli.common import Bar


def test_lines_tell_share_rate_tokens_and_time_left(capsys):
    with Bar(seconds_between_lines=0) as bar:
        bar.stage("writing tokens", 4000)
        for _ in range(4):
            bar.advance(1000, 300)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["writing tokens"] * 4
    assert [re.search(r"(\d+)%", line)[1] for line in lines] == ["25", "50", "75", "100"]
    assert re.fullmatch(r"writing tokens: 50%  \S+/s  600 tokens  \S+ left", lines[1])


def test_short_work_says_nothing(capsys):
    with Bar() as bar:
        bar.stage("reading", 10)
        bar.advance(10, 0)
    assert capsys.readouterr().err == ""
