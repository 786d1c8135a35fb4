"""The early-launch contract (`custom_ops/gpu/early.py`) in machine code: what a kernel does before it waits.

A kernel that may start early is read from its entry along every path up to `griddepcontrol.wait` (ACQBULK). There it may load from the
pointers that it declares and from nowhere else, and store nothing; it may end there only where it declares that a thread block may be idle.
Which pointer a load uses is followed through the registers, from the kernel's parameters in constant bank 0. What cannot be followed is a
finding as well: nothing passes because the reader did not understand it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from kiln.custom_ops.gpu.cubin import Instruction, Parameter, disassembled, instructions, kernels, parameters
from kiln.custom_ops.gpu.early import Waiting, waiting_kernels

WAIT = "ACQBULK"
SCRATCH = 2  # pointers that Triton appends to every kernel's arguments
UNKNOWN = "what the check cannot follow"
# Not global memory: shared, local, constant and tensor memory, and what only sounds like an access.
ELSEWHERE = {"LDS", "LDSM", "LDL", "LDC", "LDCU", "ULDC", "LDTM", "LDGDEPBAR", "STS", "STSM", "STL", "STTM", "ATOMS", "REDUX", "CREDUX"}
LOADS = ("LD",)  # LDGSTS, too, from global to shared memory
BULK_LOAD = "UBLKCP.S.G"  # the same in bulk; what a descriptor describes (UTMALDG) cannot be followed
WRITES = ("ST", "ATOM", "RED", "UTMA", "UBLK", "SULD", "SUST", "SURED", "SUATOM", "TEX", "TLD", "TMML", "MULTIMEM")  # or not known
NO_REGISTER = ("SETP", "PLOP3")  # write predicates alone
REGISTER = re.compile(r"\b(U?R)(\d+)\b")
TABLE = "c[0x3]["  # where a source's own constants lie, which are no pointers
CONSTANT = re.compile(r"c\[(\w+)\]\[([^\]]+)\]")

State = dict[str, frozenset[str]]  # register -> the pointers that it may be made of


def check(image: bytes) -> list[str]:
    """What breaks the contract in the kernels of an image that may start early."""
    found = []
    for name in kernels(image):
        declared = waiting_kernels()
        if any(name.startswith(prefix) for prefix in declared):
            waiting = declared.get(re.sub(r"_\d+$", "", name))
            if waiting is None:
                found.append(f"kernel {name} begins with the name of a kernel that waits, and is none")
            else:
                found += [f"kernel {name}: {problem}" for problem in problems(image, name, waiting)]
    return found


def problems(image: bytes, name: str, waiting: Waiting) -> list[str]:
    """What the kernel does before it waits and may not do."""
    named = pointers(parameters(image, name), waiting.arguments)
    if named is None:
        return [f"its parameters are not {', '.join(waiting.arguments)}"]
    code = instructions(disassembled(image))
    states = before_waiting(code, named)
    found = [] if any(waits(i) for i in code) else [f"it has no {WAIT}"]
    for at, state in states.items():
        instruction = code[at]
        kind = access(instruction)
        if instruction.target == -1:
            found.append(f"before it waits: {instruction}, a branch to where the check cannot follow")
        elif kind == "write":
            found.append(f"before it waits: {instruction}, which is no load")
        elif kind == "load":
            used = address(instruction, state) or {UNKNOWN}
            if wrong := used - set(waiting.reads):
                found.append(f"before it waits: {instruction}, a load from {', '.join(sorted(wrong))}")
        elif ends(instruction) and not waiting.idle:
            found.append(f"it may end without waiting: {instruction} at {instruction.address:#x}")
    return found


def pointers(given: list[Parameter], arguments: tuple[str, ...]) -> dict[str, Parameter] | None:
    """The kernel's pointers by name; None where they are not the first of its arguments. Integers equal to 1 are no parameters.

    NVRTC marks no pointer (`cuda_source.py`): then all that has 8 bytes is one, an integer too, which is one that may not be loaded from.
    """
    if not any(p.pointer for p in given):
        given = [replace(p, pointer=p.end - p.begin == 8) for p in given]
    count = sum(p.pointer for p in given) - SCRATCH
    if not 0 < count <= len(arguments) or any(p.pointer != (i < count or i >= len(given) - SCRATCH) for i, p in enumerate(given)):
        return None
    scratch = Parameter(given[-SCRATCH].begin, given[-1].end, True)
    return dict(zip(arguments, given[:count], strict=False)) | {"scratch of the compiler": scratch}


def waits(instruction: Instruction) -> bool:
    return instruction.base == WAIT and not instruction.guard


def ends(instruction: Instruction) -> bool:
    return instruction.base in ("EXIT", "RET", "KILL")


def access(instruction: Instruction) -> str | None:
    """ "load" or "write" of global memory; an access of a kind that is not known counts as a write."""
    base = instruction.base
    if base in ELSEWHERE:
        return None
    if instruction.op.startswith(BULK_LOAD):
        return "load"
    return "load" if base.startswith(LOADS) else "write" if base.startswith(WRITES) else None


def successors(code: list[Instruction], at: int) -> Iterable[int]:
    instruction = code[at]
    if instruction.target is not None and instruction.target >= 0:
        yield instruction.target
    stays = instruction.base in ("BRA", "JMP", "EXIT", "RET", "KILL") and not instruction.guard and not conditional(instruction)
    if not stays and at + 1 < len(code):
        yield at + 1  # after a call as well: what is called returns


def conditional(instruction: Instruction) -> bool:
    """A branch with its condition among the operands, as `BRA.U UP0, ...`."""
    return any(re.fullmatch(r"!?U?P\d", operand) for operand in instruction.operands)


def before_waiting(code: list[Instruction], named: dict[str, Parameter]) -> dict[int, State]:
    """Every instruction that is reached without waiting, and the state before it."""
    states: dict[int, State] = {0: {}}
    pending = [0]
    while pending:
        at = pending.pop()
        if waits(code[at]):
            continue
        after = step(code[at], states[at], named)
        for following in successors(code, at):
            known = states.get(following)
            joined = after if known is None else union(after, known)
            if joined != known:
                states[following] = joined
                pending.append(following)
    return {at: state for at, state in states.items() if not waits(code[at])}


def union(a: State, b: State) -> State:
    return {register: a.get(register, frozenset()) | b.get(register, frozenset()) for register in a.keys() | b.keys()}


def step(instruction: Instruction, state: State, named: dict[str, Parameter]) -> State:
    """The state after an instruction. A register is made of every pointer that its sources are made of; what was loaded is of none."""
    operands = list(instruction.operands)
    while operands and re.fullmatch(r"!?U?P[T\d]", operands[0]):
        operands.pop(0)
    written = operands and re.match(r"(U?R)(\d+)\b", operands[0])
    if not written or instruction.base.endswith(NO_REGISTER) or access(instruction) == "write":
        return state
    sources = operands[1:]
    width = registers_written(instruction)
    narrow = 2 if "WIDE" in instruction.op.split(".") else 0  # factors of a wide product have one register, what it is added to two
    after = dict(state)
    for i in range(width):
        made: frozenset[str] = frozenset()
        if access(instruction) is None:
            made = frozenset().union(*(of_registers(s, state, 1 if at < narrow else width) | of_constant(s, i, instruction, named)
                                       for at, s in enumerate(sources)))
        register = f"{written[1]}{int(written[2]) + i}"
        after[register] = made | (state.get(register, frozenset()) if instruction.guard else frozenset())
    return after


def registers_written(instruction: Instruction) -> int:
    """Registers from the first operand on."""
    parts = instruction.op.split(".")
    for bits in (64, 96, 128, 256):
        if str(bits) in parts:
            return bits // 32
    return 2 if "WIDE" in parts or (parts[0] == "CS2R" and "32" not in parts) else 1


def of_registers(operand: str, state: State, width: int) -> frozenset[str]:
    found: frozenset[str] = frozenset()
    for kind, number in REGISTER.findall(operand):
        for i in range(width):
            found |= state.get(f"{kind}{int(number) + i}", frozenset())
    return found


def of_constant(operand: str, word: int, instruction: Instruction, named: dict[str, Parameter]) -> frozenset[str]:
    """The pointer that a constant operand is a part of. word: which of the registers that an instruction loads."""
    if TABLE in operand:
        return frozenset()
    match = CONSTANT.search(operand)
    if not match:
        return frozenset({UNKNOWN}) if "c[" in operand or "cx[" in operand else frozenset()
    if not re.fullmatch(r"0x[0-9a-f]+", match[2]):
        return frozenset({UNKNOWN})
    begin = int(match[2], 16) + (4 * word if instruction.base in ("LDC", "ULDC", "LDCU") else 0)
    return frozenset(name for name, p in named.items() if int(match[1], 16) == 0 and p.begin <= begin < p.end)


def address(instruction: Instruction, state: State) -> frozenset[str]:
    """The pointers that the address of a load is made of."""
    text = re.sub(r"desc\[[^\]]*\]", "", " ".join(instruction.operands[1:]))
    return frozenset().union(*(of_registers(inside, state, 1) for inside in re.findall(r"\[([^\]]*)\]", text)))
