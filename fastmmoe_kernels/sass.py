"""Read a GEMM's main loop from its machine code: SASS as `nvdisasm -c` prints it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class MainLoop:
    """What the main loop of a GEMM does in one step: one block of the inner dimension, for all of the tile.

    The main loop is the innermost loop with matrix products: tensor-core instructions or, where the kernel has none,
    FFMA. A step ends where the next block's asynchronous copies are waited for, so that a loop which ptxas has unrolled
    a few times counts as many steps. Of a loop that is unrolled entirely, everything from the first of these waits to
    the last product is divided by the waits.

    Attributes:
        instructions: SASS instructions per step, one decimal.
        products: matrix instructions per step (HGMMA, HMMA, UTCHMMA, FFMA), one decimal.
        is_unrolled: there is no loop any more.
        async_bytes: of the narrowest asynchronous copy per thread in the kernel (LDGSTS: 4, 8 or 16; TMA counts as 16);
            None where there are no asynchronous copies.
        register_loads: loads from global memory into registers (LDG) in the loop, all steps together.
        wgmma_in_flight: groups of wgmma that every wait in the loop leaves running; None where nothing waits.
        unguarded_waits: wgmma waits in the kernel after which shared memory is written before a barrier of the block.
            The wait is per warpgroup: another one may still read what is overwritten.
        register_operands: wgmma in the kernel that take A from registers.
        proxy_fences: `fence.proxy.async` in the kernel.
    """

    instructions: float
    products: float
    is_unrolled: bool
    async_bytes: int | None
    register_loads: int
    wgmma_in_flight: int | None
    unguarded_waits: int
    register_operands: int
    proxy_fences: int


# the alternatives come first to last: a kernel with tensor-core products has FFMA elsewhere
PRODUCTS = (r"HGMMA|QGMMA|UTC\w*MMA", r"HMMA", r"FFMA")
WGMMA_WAIT = r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)"
COPY_WAIT = r"DEPBAR\.LE SB0,"
SHARED_WRITE = r"LDGSTS|STS|UTMALDG"
# of all warps (barrier 0), and without a condition
BLOCK_BARRIER = r"BAR\.(SYNC|RED)\S* 0x0\b"


@dataclass(frozen=True)
class _Instruction:
    """`text` is without the predicate, without `is_conditional` it always runs; `target` is an index, of a branch."""

    text: str
    is_conditional: bool
    target: int | None


def read_main_loop(sass: str) -> MainLoop:
    """Read the SASS of one kernel.

    Raises:
        ValueError: there is no matrix product in it.
    """
    code = _parse(sass)
    product = next((kind for kind in PRODUCTS if _select(code, kind, range(len(code)))), None)
    if product is None:
        raise ValueError("no matrix product in the machine code")
    loop = _main_loop(code, product)
    is_unrolled = loop is None
    if is_unrolled:
        products = _select(code, product, range(len(code)))
        first_wait = _select(code, COPY_WAIT, range(len(code)))[:1]
        loop = range(min(first_wait + products[:1]), products[-1] + 1)
    steps = max(1, len(_select(code, COPY_WAIT, loop)))
    copies = [code[index].text.split()[0] for index in _select(code, "LDGSTS|UTMALDG", range(len(code)))]
    return MainLoop(
        instructions=round(len(_select(code, "(?!NOP)", loop)) / steps, 1),
        products=round(len(_select(code, product, loop)) / steps, 1),
        is_unrolled=is_unrolled,
        async_bytes=min((_copy_bytes(name) for name in copies), default=None),
        register_loads=len(_select(code, r"LDG\b", loop)),
        wgmma_in_flight=min(
            (int(re.match(WGMMA_WAIT, code[i].text)[1], 16) for i in _select(code, WGMMA_WAIT, loop)), default=None
        ),
        unguarded_waits=sum(_is_unguarded(code, wait) for wait in _select(code, WGMMA_WAIT, range(len(code)))),
        register_operands=len(_select(code, r"[HQ]GMMA\S* R\d+, R", range(len(code)))),
        proxy_fences=len(_select(code, r"FENCE\.VIEW\.ASYNC", range(len(code)))),
    )


def _parse(sass: str) -> list[_Instruction]:
    lines, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", line):
            lines.append(instruction.groups())
    code = []
    for predicate, text in lines:
        branch = re.match(r"BRA\S*\s(.*?)`\((\.L_\w+)\)", text)
        # some branches carry their condition as an operand
        is_conditional = predicate is not None or bool(branch and branch[1].strip())
        code.append(_Instruction(text, is_conditional, labels.get(branch[2]) if branch else None))
    return code


def _select(code: list[_Instruction], pattern: str, indices: Iterable[int]) -> list[int]:
    """Those of `indices` whose instruction starts with `pattern`."""
    matches = re.compile(pattern).match
    return [index for index in indices if matches(code[index].text)]


def _copy_bytes(name: str) -> int:
    width = re.search(r"\.(64|128)\b", name)
    return 16 if name.startswith("UTMALDG") else int(width[1]) // 8 if width else 4


def _next(code: list[_Instruction], index: int) -> list[int]:
    """What may run after an instruction; a call comes back."""
    instruction = code[index]
    falls_through = instruction.is_conditional or not instruction.text.startswith(("BRA", "EXIT", "RET"))
    following = [index + 1] if falls_through and index + 1 < len(code) else []
    return following + ([instruction.target] if instruction.target is not None else [])


def _reach(start: list[int], follow: Callable[[int], Iterable[int]], stop: Callable[[int], bool]) -> set[int]:
    """`start` and what can be reached from it, through nothing that stops."""
    seen, open_ends = set(start), list(start)
    while open_ends:
        index = open_ends.pop()
        if not stop(index):
            new = set(follow(index)) - seen
            seen |= new
            open_ends += new
    return seen


def _main_loop(code: list[_Instruction], product: str) -> list[int] | None:
    """The instructions of the smallest loop with products; of several as small, the first."""
    before = [[] for _ in code]
    for index in range(len(code)):
        for following in _next(code, index):
            before[following].append(index)
    loops = []
    for branch, instruction in enumerate(code):
        head = instruction.target
        if head is None or head > branch:
            continue
        # a loop is entered at its head alone; a slow path at the end of the kernel jumps back, too
        if branch != head and branch in _reach([0], lambda i: _next(code, i), lambda i, head=head: i == head):
            continue
        loop = sorted(_reach([branch], before.__getitem__, lambda i, head=head: i == head))
        if _select(code, product, loop):
            loops.append(loop)
    return min(loops, key=len, default=None)


def _is_unguarded(code: list[_Instruction], wait: int) -> bool:
    """Whether a write to shared memory can follow the wait without a barrier in between."""

    def stops(index: int) -> bool:
        return not code[index].is_conditional and bool(re.match(BLOCK_BARRIER, code[index].text))

    return bool(_select(code, SHARED_WRITE, _reach(_next(code, wait), lambda i: _next(code, i), stops)))
