"""The committed figures of the GEMMs: comparison, files, and that they cover what is shipped."""

import pytest

from fastmmoe_kernels import baseline
from fastmmoe_kernels.aot import SHARED_LIMIT, accept, compare_all, configuration_name, shipped_variants

ACCEPTED = {"instructions": 112.0, "registers": 172, "shared_bytes": 196608, "wgmma": 8, "wgmma_in_flight": 2}


@pytest.mark.parametrize(
    ("figures", "worse", "better"),
    [
        (dict(), [], []),
        (dict(instructions=131.0), ["112 -> 131 instructions per step of the main loop (+17 %)"], []),
        (dict(instructions=114.0, registers=175), [], []),  # less than 2 %
        (dict(instructions=114.3, registers=176), ["114.3 instructions", "172 -> 176 registers (+2 %)"], []),
        (dict(shared_bytes=196609), ["196608 -> 196609 bytes of shared memory"], []),
        (dict(wgmma=4), ["8 -> 4 wgmma (-50 %)"], []),
        (dict(wgmma=0, wgmma_in_flight=None), ["8 -> 0 wgmma (-100 %)", "2 -> 0 groups of wgmma in flight"], []),
        (dict(instructions=95.0), [], ["112 -> 95 instructions per step of the main loop (-15 %)"]),
        (dict(registers=128, shared_bytes=131072), [], ["172 -> 128 registers", "196608 -> 131072 bytes"]),
        (dict(registers=168, wgmma_in_flight=1), ["2 -> 1 groups of wgmma in flight"], ["172 -> 168 registers"]),
    ],
)
def test_compare(figures, worse, better):
    figures = {name: number for name, number in (ACCEPTED | figures).items() if number}
    found = baseline.compare(ACCEPTED, figures)
    for expected, messages in zip((worse, better), found, strict=True):
        assert len(messages) == len(expected)
        assert all(text in message for text, message in zip(expected, messages, strict=True)), messages


def test_growth_from_nothing_has_no_percentage():
    assert baseline.compare({}, {"shared_bytes": 16}) == (["0 -> 16 bytes of shared memory"], [])


def test_file_has_one_line_per_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path / "aot_baseline")
    assert baseline.read_baseline("3.7.1") is None
    configurations = {"b sm_90 x=1": ACCEPTED, "a sm_80 x=2": {"registers": 96}}
    path = baseline.write_baseline("3.7.1", configurations)
    assert path.name == "triton-3.7.json"
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith('"a sm_80') and lines[2].startswith('"b sm_90')
    assert baseline.read_baseline("3.7.4+git") == configurations
    assert baseline.read_baseline("3.8.0") is None
    baseline.write_baseline("3.7.1", {})
    assert baseline.read_baseline("3.7.1") == {}


def record(kernel, target, registers=64, is_gemm=True, **config):
    return {"kernel": kernel, "target": target, "types": {"a": "*bf16"}, "config": config, "is_gemm": is_gemm,
            "registers": registers, "shared_bytes": 0, "wgmma": 0, "loop": None, "problems": []}  # fmt: skip


def test_missing_stale_and_other_configurations():
    same, worse, better, new, other, broken = records = [
        record("gemm", "sm_90", M=1),
        record("gemm", "sm_90", M=2),
        record("gemm", "sm_90", M=3),
        record("gemm", "sm_90", M=4),
        record("copy", "sm_90", is_gemm=False),
        record("gemm", "sm_90", registers=None, M=5),
    ]
    registers = ((same, 64), (worse, 60), (better, 72), (broken, 1))
    accepted = {configuration_name(r): {"registers": number} for r, number in registers}
    gone, elsewhere, unasked = (
        configuration_name(record(*where, M=9)) for where in (("gemm", "sm_90"), ("gemm", "sm_80"), ("other", "sm_90"))
    )
    accepted |= dict.fromkeys((gone, elsewhere, unasked), {"registers": 1})
    improvements, stale = compare_all(records, accepted, ["sm_90"], "gem")
    assert improvements == [f"{configuration_name(better)}: 72 -> 64 registers (-11 %)"]
    assert stale == [gone]
    assert [r["problems"] for r in records] == [
        [], ["60 -> 64 registers (+7 %)"], [], ["no baseline; run with --write-baseline"], [], [],
    ]  # fmt: skip


def test_what_does_not_compile_keeps_its_figures():
    fine, broken = record("gemm", "sm_90", M=1), record("gemm", "sm_90", registers=None, M=2)
    gone, unasked = (configuration_name(record(*where, M=9)) for where in (("gemm", "sm_90"), ("gemm", "sm_80")))
    old = dict.fromkeys((configuration_name(fine), configuration_name(broken), gone, unasked), {"registers": 1})
    accepted = accept([fine, broken], old, ["sm_90"], "gem")
    assert accepted.keys() == old.keys() - {gone}
    assert accepted[configuration_name(broken)] == accepted[unasked] == {"registers": 1}
    assert accepted[configuration_name(fine)]["registers"] == 64


@pytest.mark.parametrize("text", ["", "{", "[]", '{"configurations": []}'])
def test_a_baseline_that_is_none_is_named(monkeypatch, tmp_path, text):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    baseline.baseline_path("3.7.1").write_text(text)
    with pytest.raises(ValueError, match=r"triton-3\.7\.json: .* write it anew with --write-baseline"):
        baseline.read_baseline("3.7.1")


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_baseline_covers_every_gemm(version):
    """On all targets, and every configuration has a name of its own."""
    shipped = [
        configuration_name(
            {"kernel": v.kernel.__name__, "target": target, "types": v.signature,
             "config": v.constants | {"num_warps": v.num_warps, "num_stages": v.num_stages}}
        )
        for v in shipped_variants() if v.is_gemm for target in v.targets
    ]  # fmt: skip
    assert len(set(shipped)) == len(shipped) > 100
    accepted = baseline.read_baseline(version)
    assert accepted.keys() == set(shipped)
    for name, figures in accepted.items():
        target = name.split()[1]
        assert target in SHARED_LIMIT and figures.keys() <= baseline.FIGURES.keys()
        assert 0 < figures["registers"] <= 512
        assert ("instructions" in figures) == target.startswith("sm_"), name
        assert ("wgmma_in_flight" in figures) <= ("wgmma" in figures) <= (target == "sm_90")


def test_large_tiles_on_hopper_have_wgmma_in_flight():
    for version in ("3.6.0", "3.7.1"):
        accepted = baseline.read_baseline(version)
        large = {n: f for n, f in accepted.items() if " sm_90 " in n and "BLOCK_M=128" in n and "*fp32" not in n[:40]}
        assert large and all(f["wgmma"] >= 4 and f["wgmma_in_flight"] >= 1 for f in large.values())
