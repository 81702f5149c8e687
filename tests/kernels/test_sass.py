"""The reader of machine code, on small listings written by hand: good ones, and ones spoiled in one place."""

import pytest

from fastmmoe_kernels.sass import MainLoop, read_main_loop

# one step of a wgmma pipeline: wait for copies, multiply, wait for the wgmma before, copy the next block
STEP = """
    DEPBAR.LE SB0, 0x4
    BAR.SYNC.DEFER_BLOCKING 0x0
    FENCE.VIEW.ASYNC.S
    WARPGROUP.ARRIVE
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    BAR.SYNC.DEFER_BLOCKING 0x0
    LDGSTS.E.BYPASS.128 [R23+0x20000], desc[UR14][R24.64], !P0
    LDGDEPBAR
"""
START = """
    LDG.E R2, desc[UR14][R2.64]
    LDGSTS.E.BYPASS.128 [R23], desc[UR14][R24.64]
    LDGDEPBAR
"""
END = """
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    BAR.SYNC.DEFER_BLOCKING 0x0
    STS.128 [R160+UR9], R24
    EXIT
.L_end:
    BRA `(.L_end)
    NOP
"""
BACK = "@!P1 BRA `(.L_loop)"
GOOD = MainLoop(
    instructions=11.0, products=2.0, is_unrolled=False, async_bytes=16, register_loads=0, wgmma_in_flight=1,
    unguarded_waits=0, register_operands=0, proxy_fences=1,
)  # fmt: skip


def listing(*parts):
    """As nvdisasm prints it, from instructions and labels, one per line."""
    lines, address = ["\t.headerflags\t@EF_CUDA_SM90", ".text.kernel:"], 0
    for line in "\n".join(parts).split("\n"):
        line = line.strip()
        if line.endswith(":"):
            lines.append(line)
        elif line:
            predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
            lines.append(f"        /*{address:04x}*/ {predicate:>12} {rest} ;")
            address += 16
    return "\n".join(lines)


def rolled(step=STEP, start=START, end=END, back=BACK):
    return read_main_loop(listing(start, ".L_loop:", step, back, end))


def changed(**figures):
    return MainLoop(**(GOOD.__dict__ | figures))


def test_good_loop():
    assert rolled() == GOOD


@pytest.mark.parametrize(
    ("before", "after", "figures"),
    [
        ("LDGSTS.E.BYPASS.128", "LDGSTS.E.64", dict(async_bytes=8)),
        ("LDGSTS.E.BYPASS.128", "LDGSTS.E", dict(async_bytes=4)),
        ("LDGSTS.E.BYPASS.128 [R23+0x20000], desc", "UTMALDG.2D [UR8], [UR4], desc", dict()),
        ("LDGSTS.E.BYPASS.128 [R23+0x20000],", "LDG.E.U16 R5,", dict(register_loads=1)),
        ("LE gsb0, 0x1", "LE gsb0, 0x0", dict(wgmma_in_flight=0)),
        ("LE gsb0, 0x1", "LE gsb0, 0x2", dict(wgmma_in_flight=2)),
        ("R24, gdesc[UR8], R24", "R24, R8, gdesc[UR8], R24", dict(register_operands=1)),
        ("FENCE.VIEW.ASYNC.S\n", "", dict(instructions=10.0, proxy_fences=0)),
        ("LDGDEPBAR\n", "LDGDEPBAR\nIADD3 R1, R2, R3, RZ\nNOP\n", dict(instructions=12.0)),
    ],
)
def test_one_change(before, after, figures):
    assert STEP.count(before) == 1
    assert rolled(STEP.replace(before, after)) == changed(**figures)


def test_no_asynchronous_copies_at_all():
    spoiled = [part.replace("LDGSTS.E.BYPASS.128 [R23", "STS.128 [R23") for part in (STEP, START)]
    assert rolled(*spoiled).async_bytes is None


def test_copies_by_tma_alone():
    by_tma = [part.replace("LDGSTS.E.BYPASS.128 [R23", "UTMALDG.2D [UR8], [UR4") for part in (STEP, START)]
    assert rolled(*by_tma) == GOOD


def test_in_front_of_the_loop():
    """The narrowest copy is looked for in the whole kernel, loads into registers in the loop alone."""
    start = START + "LDGSTS.E [R9], desc[UR14][R8.64]\n LDG.E R4, desc[UR14][R2.64]"
    assert rolled(start=start) == changed(async_bytes=4)


BARRIER = "LE gsb0, 0x1\n    BAR.SYNC.DEFER_BLOCKING 0x0"


@pytest.mark.parametrize(
    ("instead", "is_guarded"),
    [
        ("LE gsb0, 0x1\n BAR.RED.AND.DEFER_BLOCKING 0x0, P0", True),
        ("LE gsb0, 0x1\n IADD3 R1, R2, R3, RZ\n BAR.SYNC.DEFER_BLOCKING 0x0", True),
        ("LE gsb0, 0x1", False),
        ("LE gsb0, 0x1\n @P3 BAR.SYNC.DEFER_BLOCKING 0x0", False),  # not everybody comes
        ("LE gsb0, 0x1\n BAR.ARV 0x0, 0x80", False),  # nobody waits
        ("LE gsb0, 0x1\n BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", False),  # of one warpgroup
        ("LE gsb0, 0x1\n WARPSYNC.ALL", False),
        # around the barrier
        ("LE gsb0, 0x1\n @P4 BRA `(.L_over)\n BAR.SYNC.DEFER_BLOCKING 0x0\n.L_over:", False),
        ("LE gsb0, 0x1\n BRA.U UP0, `(.L_over)\n BAR.SYNC.DEFER_BLOCKING 0x0\n.L_over:", False),
        ("LE gsb0, 0x1\n BRA.U !UP0, `(.L_over)\n STS [R1], R2\n.L_over:\n BAR.SYNC.DEFER_BLOCKING 0x0", False),
        ("LE gsb0, 0x1\n BRA `(.L_over)\n STS [R1], R2\n.L_over:\n BAR.SYNC.DEFER_BLOCKING 0x0", True),
    ],
)
@pytest.mark.parametrize("write", ["LDGSTS.E.BYPASS.128 [R23+0x20000]", "STS.64 [R23]", "UTMALDG.2D [UR8]"])
def test_barrier_between_wait_and_overwrite(instead, is_guarded, write):
    step = STEP.replace(BARRIER, instead).replace("LDGSTS.E.BYPASS.128 [R23+0x20000]", write)
    assert rolled(step).unguarded_waits == (not is_guarded)


def test_barrier_is_missing_at_the_end_of_the_loop_alone():
    assert rolled(end=END.replace("BAR.SYNC.DEFER_BLOCKING 0x0", "")).unguarded_waits == 1


def test_overwrite_in_the_next_iteration():
    """The copies come first and the wait last, so that the next write is behind the backward branch."""
    *products, wait, _, copy, commit = STEP.strip().split("\n")
    assert rolled("\n".join([copy, commit, *products, wait])).unguarded_waits == 1
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x0"
    assert rolled("\n".join([barrier, copy, commit, *products, wait])).unguarded_waits == 0


def test_loop_unrolled_a_few_times_counts_its_steps():
    other = STEP.replace("LDGDEPBAR", "LDGDEPBAR\n IADD3 R1, R2, R3, RZ")
    loop = rolled(STEP + other)
    assert loop.instructions == 11.0 and loop.products == 2.0 and not loop.is_unrolled


def test_loop_unrolled_entirely():
    """From the first wait for copies to the last product: twice the ten instructions and six of the last step."""
    loop = read_main_loop(listing(START, STEP, STEP, STEP, END))
    assert loop.is_unrolled and loop.instructions == round(26 / 3, 1) and loop.products == 2.0
    assert loop.wgmma_in_flight == 1 and loop.unguarded_waits == 0
    loop = read_main_loop(listing(START, STEP, STEP.replace("gsb0, 0x1", "gsb0, 0x0"), STEP, END))
    assert loop.wgmma_in_flight == 0


def test_one_step_alone_waits_for_nothing_in_flight():
    assert read_main_loop(listing(START, STEP.split("WARPGROUP.DEPBAR")[0], END)).wgmma_in_flight is None


@pytest.mark.parametrize("product", ["HMMA.16816.F32 R4, R8, R10, R4", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]"])
def test_other_tensor_cores(product):
    step = STEP.replace("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24", product)
    step = "\n".join(line for line in step.split("\n") if "HGMMA" not in line and "WARPGROUP" not in line)
    assert rolled(step) == changed(instructions=8.0, products=1.0, wgmma_in_flight=None)


def test_float32_and_its_tail():
    """FFMA is the product where there are no tensor cores, and nothing else where there are."""
    tail = ".L_tail:\n" + "FFMA R1, R2, R3, R1\n" * 4 + "@P0 BRA `(.L_tail)\n"
    step = "DEPBAR.LE SB0, 0x0\n BAR.SYNC.DEFER_BLOCKING 0x0\n" + "FFMA R1, R2, R3, R1\n" * 3
    assert rolled(step, end=END.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "")).products == 3.0
    assert rolled(end=tail + END) == GOOD


def test_inner_loops_and_slow_paths():
    """A loop that tries a barrier again, a loop around all, and a slow path that jumps back into the middle."""
    step = ".L_try:\n SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R1], R2\n @!P2 BRA `(.L_try)\n" + STEP
    slow = "@P5 BRA `(.L_slow)\n.L_back:\n"
    path = ".L_slow:\n IADD3 R1, R2, R3, RZ\n BRA `(.L_back)\n"
    outer = END.replace("    EXIT", "    @P6 BRA `(.L_outer)\n EXIT")
    loop = read_main_loop(listing(".L_outer:", START, slow, ".L_loop:", step, BACK, outer, path))
    assert loop == changed(instructions=13.0)


def test_slow_path_of_the_loop_is_part_of_it():
    step = "@P5 BRA `(.L_slow)\n.L_back:\n" + STEP
    path = ".L_slow:\n IADD3 R1, R2, R3, RZ\n BRA `(.L_back)\n"
    assert rolled(step, end=END + path).instructions == 14.0


def test_slow_path_makes_no_loop_of_unrolled_code():
    """It jumps back, and all products come in front of it."""
    path = ".L_slow:\n IADD3 R1, R2, R3, RZ\n BRA `(.L_back)\n"
    loop = read_main_loop(listing(START, STEP, STEP, "@P5 BRA `(.L_slow)\n.L_back:\n", END, path))
    assert loop.is_unrolled and loop.instructions == 8.0


@pytest.mark.parametrize("sass", ["", listing(START, END)])
def test_without_products(sass):
    with pytest.raises(ValueError, match="no matrix product"):
        read_main_loop(sass)
