import json
from dataclasses import replace

import pytest
import torch

from ss1_compile.kernels import lowering, tune
from ss1_compile.kernels.lowering import Layer

H200 = "NVIDIA H200"
LAYER = Layer(
    rows=8192,
    in_features=4096,
    out_features=14336,
    reduced_features=1024,
    hashes=4,
    kind="rotation",
)


def test_the_shipped_table_is_read_and_beats_dense_where_it_should():
    choice = lowering.expected(LAYER, H200)
    assert choice.measured
    assert choice.lowering in LAYER.candidates()
    assert choice.speedup > 2.5
    assert lowering.beats_dense(LAYER, H200)


def test_the_best_of_a_measured_row_is_chosen():
    device = lowering.profile(H200)
    for key, by_rows in device.rows.items():
        kind, dtype, features, reduced, hashes = key.replace("+bias", "").split()
        in_features, out_features = map(int, features.split("->"))
        for rows, times in by_rows.items():
            layer = Layer(
                rows=rows,
                in_features=in_features,
                out_features=out_features,
                reduced_features=int(reduced[3:]),
                hashes=int(hashes[2:]),
                kind=kind,
                dtype=dtype,
                bias=key.endswith("+bias"),
            )
            assert layer.key == key
            choice = lowering.expected(layer, H200)
            best = min(us for name, us in times.items() if name != "dense")
            assert choice.measured
            assert times[choice.lowering] == choice.microseconds == best
            assert lowering.beats_dense(layer, H200) == (best < times["dense"])


def test_the_shipped_table_holds_what_tune_measures():
    rows = lowering.profile(H200).rows
    wanted = {layer.key for layer in tune.layers(tune.LAYERS, tune.REDUCTIONS)}
    assert set(rows) == wanted
    assert all(tuple(by_rows) == tune.ROWS for by_rows in rows.values())


def test_rows_fall_into_measured_buckets():
    assert [lowering.bucket(m) for m in (1, 2, 4, 5, 64, 65, 8192, 10**6)] == [
        *(1, 4, 4, 16, 64, 256, 8192, 32768)
    ]
    assert set(tune.ROWS) == set(lowering._BUCKETS)


def test_an_unmeasured_shape_and_an_unknown_device_use_the_cost_model():
    odd = replace(LAYER, in_features=5000, out_features=7000)
    for device in (H200, "some other GPU"):
        choice = lowering.expected(odd, device)
        assert not choice.measured
        assert choice.lowering in odd.candidates()
    assert lowering.expected(replace(odd, rows=1), H200).lowering in ("gemv", "stream")


def test_the_cost_model_is_near_the_measurements():
    """Within a factor of two: it ranks, and it must not mislead about dense."""
    device = lowering.profile(H200)
    for rows in (1, 64, 4096, 16384):
        layer = replace(LAYER, rows=rows)
        for name, measured in device.rows[layer.key][rows].items():
            model = (
                lowering.dense_cost(layer, device)
                if name == "dense"
                else lowering.cost(layer, name, device)
            )
            assert 0.5 < model / measured < 2.0, (rows, name, model, measured)


def test_the_cost_model_loses_little_against_the_table():
    device = lowering.profile(H200)
    regrets = []
    for rows in (1, 16, 64, 1024, 8192):
        for kind, hashes in (("rotation", 4), ("learned", 1)):
            layer = replace(LAYER, rows=rows, kind=kind, hashes=hashes)
            times = device.rows[layer.key][rows]
            costs = {name: lowering.cost(layer, name, device) for name in layer.candidates()}
            picked = min(costs, key=costs.__getitem__)
            regrets.append(times[picked] / min(times[name] for name in costs))
    assert sum(regrets) / len(regrets) < 1.1


def test_float16_uses_the_bfloat16_measurements():
    assert lowering.expected(replace(LAYER, dtype="float16"), H200).measured


def test_candidates():
    assert LAYER.candidates() == ("library", "triton")
    assert replace(LAYER, tma=False).candidates() == ("library",)
    assert replace(LAYER, rows=1).candidates() == ("gemv", "stream", "library")
    assert replace(LAYER, rows=1, kind="learned").candidates() == ("stream", "library")


def test_override():
    chosen = lowering.choose(LAYER, H200)
    (other,) = set(LAYER.candidates()) - {chosen}
    with lowering.override(other):
        assert lowering.choose(LAYER, H200) == other
        with lowering.override("stream"):  # cannot run 8192 rows
            assert lowering.choose(LAYER, H200) == chosen
    assert lowering.choose(LAYER, H200) == chosen
    with pytest.raises(ValueError, match=r"no lowering 'fast'.*library"), lowering.override("fast"):
        pass


def test_written_tables_are_read_back(tmp_path, monkeypatch):
    rows = {LAYER.key: {"8192": {"dense": 10.0, "library": 4.0, "triton": 3.0}}}
    table = {"device": "Test GPU", "origin": "here", "copy_tb_s": 1.0, "matmul_tflop_s": 100.0}
    path = tmp_path / lowering.file_name("Test GPU")
    tune.write(table | {"rows": rows}, path)
    assert json.loads(path.read_text())["rows"] == rows
    monkeypatch.setattr(lowering, "_TABLES", tmp_path)
    choice = lowering.expected(LAYER, "Test GPU")
    assert (choice.lowering, choice.measured, choice.speedup) == ("triton", True, 10 / 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_cover_every_candidate():
    layer = Layer(
        rows=4,
        in_features=512,
        out_features=256,
        reduced_features=256,
        hashes=2,
        kind="rotation",
    )
    for rows in (1, 4, 128):
        times = tune.times(replace(layer, rows=rows))
        assert set(times) == {"dense", *replace(layer, rows=rows).candidates()}
        assert all(us > 0 for us in times.values())


H200 = "NVIDIA H200"


def product(rows, reduced, out_features, hashes, **changes):
    sizes = {"in_features": reduced, "reduced_features": reduced, "out_features": out_features}
    kind = "learned" if hashes == 1 else "rotation"
    return lowering.Layer(rows=rows, hashes=hashes, kind=kind, **sizes, **changes)


def test_a_product_goes_to_triton_for_its_epilogue_and_streams_few_rows():
    plain = product(16384, 256, 4096, 4)
    assert lowering.choose_product(plain, 0.0, H200) == "library"
    assert lowering.choose_product(plain, 3.0, H200) == "triton"
    assert lowering.choose_product(replace(plain, tma=False), 3.0, H200) == "library"
    for rows in (1, lowering.FEW_ROWS):
        assert lowering.choose_product(replace(plain, rows=rows), 0.0, H200) == "stream"
    # no table: the cost model
    assert lowering.choose_product(plain, 3.0, "a GPU never seen") == "triton"
