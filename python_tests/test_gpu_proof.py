"""The tools that look at compiled kernels: loops of machine code, PTX of wrappers, the static bound's arithmetic."""

import dataclasses
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sass():
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("cuda_sass")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def bound():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("cuda_bound.model")
    sys.path.remove(str(ROOT / "benchmarks"))


def listing(sass, *lines):
    """`@ BRA 3`: a predicated branch to instruction 3."""
    code = []
    for i, line in enumerate(lines):
        guarded = line.startswith("@ ")
        opcode, _, operands = line.removeprefix("@ ").partition(" ")
        if opcode == "BRA":
            operands = hex(16 * int(operands))
        code.append(sass.Instruction(16 * i, opcode, operands, guarded))
    return tuple(code)


def test_loops_lie_inside_each_other(sass):
    code = listing(
        sass, "MOV", "LDG.E.128", "LDSM.16.M88.4", "HMMA.16816", "HMMA.16816", "@ BRA 2", "STG.E.64", "@ BRA 1", "EXIT"
    )
    outside, outer, inner = sass.loops(code)
    assert (outside.parent, outer.parent, inner.parent) == (-1, 0, 1)
    assert outside.counts == {"issue": 2, "alu": 1}
    assert outer.counts == {"issue": 3, "wavefronts": 4 + 2, "LDG": 1, "STG": 1}
    assert inner.counts == {"issue": 4, "wavefronts": 4, "HMMA": 2, "LDSM": 1}


def test_code_after_the_end_is_no_loop(sass):
    """A slow path that branches back to where it came from, calls, and what only calls reach."""
    code = listing(sass, "IADD3", "@ BRA 4", "STG.E", "EXIT", "MUFU.RCP", "CALL.REL div", "BRA 2", "DADD", "RET.REL")
    (outside,) = sass.loops(code)
    assert outside.counts["issue"] == 4 and "fp64" not in outside.counts and "xu" not in outside.counts


def test_names_of_kernels(sass):
    short = sass._short(
        "void synergen::cuda::(anonymous namespace)::rope_kernel<synergen::bf16, 8>(synergen::cuda::(anonymous "
        "namespace)::RopeLaunch)"
    )
    assert short == "rope_kernel<bf16, 8>"
    assert sass._short("void f<(int)3, (bool)1>(int)") == "f<3, 1>"


def test_bound_takes_the_largest_term(bound, monkeypatch):
    from cuda_bound import budgets
    from cuda_bound.cards import H100

    made = {"registers": 128, "shared": 0}
    loops = [(-1, {"issue": 100}), (0, {"issue": 50, "HMMA": 10, "wavefronts": 8})]
    monkeypatch.setattr(budgets, "kernel", lambda name, arch: made)
    monkeypatch.setattr(budgets, "loops", lambda name, arch: loops)
    launch = bound.Launch("k", blocks=133, threads=256, shared=60 << 10, dram=3.35e6, flops=1e9, per_warp={"HMMA": 40})
    assert bound.occupancy(H100, launch) == 2
    code = bound.instructions(H100, launch)
    assert code.straight == {"issue": 100} and code.looped == {"issue": 4 * 50, "HMMA": 40, "wavefronts": 32}
    assert not any(code.edges.values()) and not any(code.stops.values())
    got = bound.bound(H100, launch)
    assert got.terms["DRAM"] == pytest.approx(1e-6) == pytest.approx(got.ideal["DRAM"])
    assert got.terms["tensor"] == pytest.approx(got.ideal["tensor"] * 2 * 132 / 133)  # one SM has two blocks
    assert got.terms["issue"] == pytest.approx(2 * 8 * 300 / 4 / H100.clock)
    assert got.edges == pytest.approx(100 * 2 / H100.clock + H100.dram_latency)  # the other block hides it
    assert got.total == max(got.terms.values()) + H100.launch + got.edges
    # Three of the four turns are named as a stop before a barrier: what was asked for ahead goes on meanwhile.
    stopped = bound.Launch("k", 132, 256, dram=3.35e6, stops={"HMMA": 30}, barriers=1, ahead=1e9)
    hidden = bound.bound(H100, stopped)
    assert hidden.barriers == pytest.approx(0, abs=1e-12)
    waits = bound.bound(H100, dataclasses.replace(stopped, ahead=0))
    assert waits.barriers == pytest.approx(H100.barrier + 3 * 50 * 2 / H100.clock)
    # What one warp of eight runs alone counts whole at the edges, and once in the pipes.
    alone = bound.bound(H100, dataclasses.replace(launch, alone=1.0))
    assert alone.edges == got.edges
    assert alone.terms["issue"] == pytest.approx(2 * (100 + 8 * 200) / 4 / H100.clock)
    # Little's law: one KiB under way for each block.
    slow = bound.bound(H100, bound.Launch("k", 132, 256, dram=3.35e6, in_flight=1024, others=0))
    assert slow.terms["DRAM"] == pytest.approx(3.35e6 / (132 * 1024 / H100.dram_latency))
    with pytest.raises(ValueError, match="no loop holds LDSM"):
        bound.bound(H100, bound.Launch("k", 1, 32, per_warp={"LDSM": 1}))


def test_every_bounded_kernel_is_compiled(bound):
    from cuda_bound import budgets, entries

    assert len({entry.name for entry in entries.ENTRIES}) == len(entries.ENTRIES)
    for name in budgets.bounded():
        budgets.place(name)
    assert set(budgets.bounded()) == set(budgets.read()["loops"])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_wrappers_are_the_ptx_that_was_read():
    done = subprocess.run([sys.executable, ROOT / "tools" / "cuda_goldens.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_wrapper_has_a_golden(sass):
    sys.path.insert(0, str(ROOT / "tools"))
    goldens = importlib.import_module("cuda_goldens")
    sys.path.remove(str(ROOT / "tools"))
    assert set(goldens.wrappers()) == {*goldens.CALLS, *goldens.NONE}


def test_budgets_and_rules(sass):
    compiled = importlib.import_module("cuda_compiled")
    budget = {"registers": 40, "LDG": 3, "HMMA": 64}
    assert not list(compiled.over_budget({"registers": 39, "LDG": 3, "HMMA": 64}, budget))
    assert list(compiled.over_budget({"registers": 41, "CALL div_s64": 1}, budget)) == [
        "CALL div_s64 must be at most 0, got 1",
        "HMMA must be 64, got 0",
        "registers must be at most 40, got 41",
    ]
    waits, stale, weights = "LD.E.STRONG.GPU", "LDG.E.128.CONSTANT", "LDG.E.128.NA.CONSTANT"

    def broken(local, *opcodes):
        return list(compiled.broken_rules(sass.Kernel("k<bf16>", 8, 0, local, listing(sass, *opcodes))))

    assert broken(8, "STL") == ["local memory must be 0 bytes, got 8", "LDL and STL must be 0, got 0 and 1"]
    assert broken(0, waits, stale) == ["reads what its launch writes, so LDG.CONSTANT must be 0, got 1"]
    assert not broken(0, waits, weights) and not broken(0, stale)
    call = sass.Instruction(0, "CALL.REL.NOINC", "$__internal_3_$__cuda_sm20_div_s64", False)
    assert compiled.call_name(call) == "div_s64"


def test_every_planted_mistake_finds_its_place():
    sys.path.insert(0, str(ROOT / "tools"))
    planted = importlib.import_module("mutants").every()
    sys.path.remove(str(ROOT / "tools"))
    assert len({mutant.name for mutant in planted}) == len(planted) > 900
    for mutant in planted:
        assert mutant.text() != (ROOT / "csrc" / "cuda" / mutant.file).read_text(), mutant.name
