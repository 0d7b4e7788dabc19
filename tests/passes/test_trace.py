"""What the trace of the passes says and writes: counted by hand on small graphs."""

import json
import logging
import re

import pytest
import torch
from torch import fx, nn

from ss1_compile import ConfigError, UnhandledLinearError, compress_exported
from ss1_compile.passes import PassTrace
from ss1_compile.passes.trace import graph_text

D = 64


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hand_built():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.neg, (graph.call_function(torch.neg, (x,)),)))
    return graph


def drop_negations(graph):
    first, second = graph.find_nodes(op="call_function", target=torch.neg)
    second.replace_all_uses_with(first.args[0])
    graph.erase_node(second)
    graph.erase_node(first)
    return 2


def traced(graph, folder=None):
    trace = PassTrace(graph, nn.Module(), folder)
    with trace("look") as did:
        did["negations"] = 2
    with trace("drop negations") as did:
        did["dropped"] = drop_negations(graph)
    return trace


def test_records_and_log(caplog):
    caplog.set_level(logging.INFO, "ss1_compile")
    trace = traced(hand_built())
    look, drop = trace.records
    assert (look.nodes_before, look.nodes_after, look.did) == (4, 4, {"negations": 2})
    assert (drop.nodes_before, drop.nodes_after, drop.did) == (4, 2, {"dropped": 2})
    assert look.before is look.after is None
    assert trace.folder is None
    lines = [re.sub(r"[\d.]+ ms", "T ms", message) for message in caplog.messages]
    assert lines == [
        "look: negations 2; 4 nodes; T ms",
        "drop negations: dropped 2; 4 → 2 nodes; T ms",
    ]


def test_debug_level_shows_the_graphs_that_changed(caplog):
    caplog.set_level(logging.DEBUG, "ss1_compile")
    traced(hand_built())
    (shown,) = (message for message in caplog.messages if message.startswith("graph after"))
    assert shown.startswith("graph after drop negations:\ndef forward(")
    assert "torch.neg" not in shown


def test_files(tmp_path):
    graph = hand_built()
    before = graph_text(graph, nn.Module())
    trace = traced(graph, tmp_path / "new" / "debug")
    folder = tmp_path / "new" / "debug" / "graph_000"
    assert trace.folder == folder
    assert sorted(file.name for file in folder.iterdir()) == [
        "00_captured.txt",
        "02_drop_negations.diff",
        "02_drop_negations.txt",
        "passes.json",
        "passes.txt",
    ]
    assert (folder / "00_captured.txt").read_text() == before
    assert (folder / "02_drop_negations.txt").read_text() == graph_text(graph, nn.Module())
    diff = (folder / "02_drop_negations.diff").read_text()
    assert len(re.findall(r"^-.*torch\.neg", diff, re.M)) == 2
    rows = json.loads((folder / "passes.json").read_text())
    assert [(row["name"], row["before"], row["after"]) for row in rows] == [
        ("look", "00_captured.txt", "00_captured.txt"),
        ("drop negations", "00_captured.txt", "02_drop_negations.txt"),
    ]
    assert all(row["milliseconds"] > 0 for row in rows)
    table = (folder / "passes.txt").read_text().splitlines()
    assert table[1].split()[-1] == "unchanged"
    total = sum(row["milliseconds"] for row in rows)
    assert float(table[-1].split()[-1]) == pytest.approx(total, abs=0.01)


def test_every_graph_has_its_own_folder(tmp_path):
    (tmp_path / "graph_001").mkdir()
    folders = [PassTrace(hand_built(), nn.Module(), tmp_path).folder for _ in range(3)]
    assert [folder.name for folder in folders] == ["graph_000", "graph_002", "graph_003"]


def test_a_pass_that_fails_leaves_what_came_before_it(tmp_path):
    trace = PassTrace(hand_built(), nn.Module(), tmp_path)
    with trace("look"):
        pass
    with pytest.raises(ZeroDivisionError), trace("divide"):
        raise ZeroDivisionError
    rows = json.loads((tmp_path / "graph_000" / "passes.json").read_text())
    assert [row["failed"] for row in rows] == [None, "failed with ZeroDivisionError"]
    assert "failed with ZeroDivisionError" in (tmp_path / "graph_000" / "passes.txt").read_text()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"debug_dir='.*file' cannot be written to \(.*exists"):
        PassTrace(hand_built(), nn.Module(), file)


PASSES = ["inline_checkpoints", "expand_linears", "find_sites", "project", "rewrite_sites"]


def names(folder):
    return [row["name"] for row in json.loads((folder / "passes.json").read_text())]


def test_backend_traces_every_pass(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ss1_compile.passes")
    options = {"inner_backend": "eager", "reduction": 1, "debug_dir": tmp_path}
    fast = torch.compile(Residual().eval(), backend="ss1", options=options)
    with torch.no_grad():
        fast(torch.randn(2, D))
        fast(torch.randn(3, D))  # a second graph, for any number of rows
    assert {folder.name for folder in tmp_path.iterdir()} == {"graph_000", "graph_001"}
    folder = tmp_path / "graph_000"
    assert names(folder)[:5] == PASSES
    assert names(folder)[-1] == "eager"
    rows = {row["name"]: row for row in json.loads((folder / "passes.json").read_text())}
    assert rows["find_sites"]["did"] == {"sites": 2, "skipped": 0}
    assert rows["project"]["did"] == {"projected": 2, "left": 0}
    assert rows["rewrite_sites"]["did"] == {"rewritten": 2}
    captured = (folder / rows["rewrite_sites"]["before"]).read_text()
    rewritten = (folder / rows["rewrite_sites"]["after"]).read_text()
    assert (captured.count("nn.linear("), captured.count("ss1.linear")) == (2, 0)
    assert (rewritten.count("nn.linear("), rewritten.count("ss1.linear")) == (0, 2)
    assert f'"f32[2, {2 * D}]"' in captured
    assert "2 of 2 linear layers are SS1" in (folder / "report.txt").read_text()
    for name in PASSES:
        assert sum(message.startswith(f"{name}: ") for message in caplog.messages) == 2


def test_compress_exported_traces_every_pass(tmp_path):
    model, x = Residual().eval(), torch.randn(2, D)
    ep = torch.export.export(model, (x,))
    new, _ = compress_exported(ep, reduction=1, debug_dir=str(tmp_path))
    folder = tmp_path / "graph_000"
    assert names(folder)[:4] == PASSES[1:]
    last = json.loads((folder / "passes.json").read_text())[-1]["after"]
    assert (folder / last).read_text() == graph_text(new.graph, new.graph_module)
    assert (folder / "report.txt").exists()


def test_strict_failure_can_be_looked_at(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, D))

        def forward(self, x):
            return torch.einsum("btd,df->bf", x, self.weight)

    ep = torch.export.export(Odd(), (torch.randn(4, 3, D),))
    with pytest.raises(UnhandledLinearError, match="weight: einsum"):
        compress_exported(ep, strict=True, debug_dir=tmp_path)
    rows = json.loads((tmp_path / "graph_000" / "passes.json").read_text())
    assert [(row["name"], row["failed"]) for row in rows] == [
        ("expand_linears", None),
        ("find_sites", None),
        ("project", "failed with UnhandledLinearError"),
    ]


def test_bodies_of_higher_order_operators_are_shown(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.yes, self.ok = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda t: self.yes(t), lambda t: -t, (self.ok(x),))

    options = {"inner_backend": "eager", "reduction": 1, "debug_dir": tmp_path}
    with torch.no_grad():
        torch.compile(Branch().eval(), backend="ss1", options=options)(torch.randn(2, D))
    text = (tmp_path / "graph_000" / "00_captured.txt").read_text()
    assert text.count("def forward(") == 3
    assert "# --- cond_true_0 ---" in text


@pytest.mark.parametrize("bad", [3, True, ["out"]])
def test_bad_debug_dir(bad):
    options = {"inner_backend": "eager", "debug_dir": bad}
    with torch.no_grad(), pytest.raises(Exception, match="ConfigError: debug_dir must be a path"):
        torch.compile(Residual(), backend="ss1", options=options)(torch.randn(2, D))


def test_every_fusion_pass_is_traced(tmp_path):
    options = {"inner_backend": "eager", "reduction": 1, "debug_dir": tmp_path, "fuse": True}
    model, x = Residual().eval(), torch.randn(2, D)
    with torch.no_grad():
        fast = torch.compile(model, backend="ss1", options=options)(x)
        torch.testing.assert_close(fast, model(x))
    folder = tmp_path / "graph_000"
    assert names(folder)[5:] == [
        "share_sketches",
        "fuse_activations",
        "fuse_epilogues",
        "fuse_norms",
        "join_products",
        "eager",
    ]
    rows = {row["name"]: row for row in json.loads((folder / "passes.json").read_text())}
    assert rows["fuse_activations"]["did"] == {"relu": 1}
    assert "activation_sketch" in (folder / rows["fuse_activations"]["after"]).read_text()
    assert rows["join_products"]["did"] == {"joined": 1}
    assert "matmul_sketch" in (folder / rows["join_products"]["after"]).read_text()
