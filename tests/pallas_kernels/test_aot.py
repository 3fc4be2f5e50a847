"""The compile matrix reads what compilers write down, judges it, and outlives their crashes. No compiler is needed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pallas_kernels import cases
from pallas_kernels.aot import __main__ as aot
from pallas_kernels.aot import bundles, counts, cuda, pool, ptx, results, table, targets, tpu, worker
from pallas_kernels.aot.bundles import Span
from pallas_kernels.aot.results import COMPILED, FAILED, UNSUPPORTED, Call, Counts, Result
from pallas_kernels.cases import Case

V6E, TPU7X, H100 = targets.named(["v6e", "TPU7x", "H100"])


# The schedule of a TPU kernel

# A grid's loop (bundles 1 to 17), one delay slot after each branch: a part that clears (4, 5), one that multiplies in an inner
# loop (8 to 11), one that multiplies beside it (14).
SCHEDULE = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s9_s2 = smov 0 /* copy for cssa */  ;;  %s8_s1 = smov 3 }
   0x1 LB: > { %s7_s1 = sphi %s9_s2, %s6_s1 /* phi */ } /* Start region 20 */
   0x2   : > { %1 = sbr.rel (%p1_p0) target = $region5  ;;  %s6_s1 = sadd.s32 1, %s7_s1 /* copy for cssa */ }
   0x3   :  {}
   0x4   : > { %2 = vst [vmem:[#allocation2] sm:$0xff] %v1_v0 }
   0x5   : > { %3 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s1, /* a bundle over
two lines */ } /* Start region 4 */
   0x6 PF: > { %4 = sbr.rel (%p2_p1) target = $region9 } /* Start/End empty region 5 :: End region 4 */
   0x7   : > { %s4_s3 = smov %s3_s4 }
   0x8 LB: >> { %s5_s3 = sphi %s8_s1, %s11_s3 /* phi */ } /* Start region 7 */
   0x9   : >> { %s11_s3 = sadd.s32 4, %s5_s3 /* copy for cssa */  ;;  %5 = vmatmul.bf16 %v1 }
   0xa   : >> { %p3_p2 = scmp.ge.s32.totalorder %s11_s3, 15 /* loop exit test */  ;;  %6 = sbr.rel (!%p3_p2) target = $region7 }
   0xb   :  {}
   0xc PF: > { %7 = sbr.rel (%p4_p1) target = $region12 } /* Start/End empty region 9 */
   0xd   : > { %8 = vmov %v2 }
   0xe   : > { %9 = vmatmul.bf16 %v1 }
   0xf PF: > { %p5_p2 = scmp.ge.s32.totalorder (%p3_p2), %s6_s1, 10 /* loop exit test */ } /* Start/End empty region 12 */
  0x10   : > { %10 = sbr.rel (!%p5_p2) target = $region20 }
  0x11   : > { %11 = vnop }
  0x12   :  { %12 = vnop } /* exit bundle */
"""
MULTIPLYING = {9, 14}


def use_text(multiplying=MULTIPLYING, n=19, spilling=()) -> str:
    rows = [f"{int(i in multiplying)} 1 {int(i in spilling)}" for i in range(n)]
    return "== CAPACTIY:\nMXU, SALU, VSTORE:SPILL\n    2     4     1\n== UTILIZATION:\n" + "\n".join(rows) + "\n"


def test_a_schedule_is_read_into_loops_with_their_lengths_and_parts():
    read = bundles.schedule(SCHEDULE, delay_slots=1)
    assert read.bundles == 19
    assert read.loops == {Span(8, 11): 3, Span(1, 17): 10}  # from 3 by 4 to 15: 3 passes
    assert read.parts == [Span(4, 5), Span(8, 11), Span(14, 14)]


def test_a_step_is_counted_with_and_without_the_parts_that_multiply_nothing():
    found = bundles.count(bundles.schedule(SCHEDULE, 1), bundles.use(use_text(spilling={0, 9})))
    assert (found.total, found.passes, found.exact, found.spills) == (19, 10, True, 2)
    assert found.step == 17 + 2 * 4  # the inner loop's four bundles run three times
    assert found.working == found.step - 2  # without what clears
    assert found.one_path == found.working - 1  # of the two parts that multiply, the longer
    assert (found.unit, found.share) == ("SALU", pytest.approx(1 / 4))


def test_a_loop_is_followed_through_what_was_stored_for_want_of_scalar_registers():
    text = SCHEDULE.replace("sadd.s32 4, %s5_s3 ", "sadd.s32 4, %s13_s3 ")
    assert bundles.schedule(text, 1).loops[Span(8, 11)] is None
    spill, fill = "%14 = sst [smem:[#allocation7_spill]] %s5_s3  ;;  ", "%s13_s3 = sld [smem:[#allocation7_spill]]  ;;  "
    text = text.replace("%s5_s3 = sphi", spill + "%s5_s3 = sphi").replace("%s11_s3 = sadd", fill + "%s11_s3 = sadd")
    assert bundles.schedule(text, 1).loops[Span(8, 11)] == 3
    twice = text.replace("%2 = vst", "%15 = sst [smem:[#allocation7_spill]] %s9_s2  ;;  %2 = vst")
    assert bundles.schedule(twice, 1).loops[Span(8, 11)] is None


def test_an_inner_loop_of_unknown_length_counts_once_and_is_told():
    text = SCHEDULE.replace("smov 3 }", "sld [smem:[#allocation1]] }")
    found = bundles.count(bundles.schedule(text, 1), bundles.use(use_text()))
    assert (found.step, found.exact) == (17, False)
    row = Result("k", "c", "v6e", COMPILED, calls=(Call("n", 1, found),))
    assert "14 to 15+" in table.table([row]) and "17+" in table.table([row])


def test_a_kernel_without_a_product_or_a_loop_counts_all_it_has():
    found = bundles.count(bundles.schedule(SCHEDULE, 1), bundles.use(use_text(multiplying=())))
    assert found.working == found.one_path == found.step == 25
    straight = "".join(f"  {i:#x}   :  {{ %{i} = vnop }}\n" for i in range(5))
    found = bundles.count(bundles.schedule(straight, 4), bundles.use(use_text({2}, 5)))
    assert (found.total, found.passes, found.step, found.working) == (5, 1, 5, 5)


def test_dumps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="19 bundles, the units' use of 18"):
        bundles.count(bundles.schedule(SCHEDULE, 1), bundles.use(use_text(n=18)))
    with pytest.raises(ValueError, match="jumps from bundle 3 to 5"):
        bundles.schedule("\n".join(line for line in SCHEDULE.splitlines() if not line.startswith("   0x4")), 1)
    with pytest.raises(ValueError, match="lacks a region"):
        bundles.schedule(SCHEDULE.replace("empty region 5", "empty region 55"), 1)
    bundles.schedule("   0x0   :  { %1 = sbr.rel (%p1) target = $region4 }\n   0x1 PF:  {}\n", 4)  # before any loop: v5p's
    with pytest.raises(ValueError, match="column for each unit"):
        bundles.use(use_text().replace("MXU, SALU", "MXU"))


HLO = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %flash.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a": "b"}}, backend_config={"scoped_memory_configs":[{"memory_space":"1","offset":"4096","size":"900000"}],"used_scoped_memory_configs":[{"memory_space":"3","offset":"0","size":"7"},{"memory_space":"1","offset":"0","size":"12288"}]}
  %sin.2 = f32[8]{0} fusion(%flash.1), backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"5"}]}
  ROOT %plain.3 = f32[8]{0} custom-call(%sin.2), custom_call_target="tpu_custom_call", backend_config={"scoped_memory_configs":[]}
}
"""  # noqa: E501


def test_the_vmem_of_kernels_is_read_from_the_compiled_module():
    assert tpu.kernels(HLO) == {"flash.1": 8192, "plain.3": None}


# What the CUDA compilers say

PTXAS = """\
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'two' in line 4
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 66.232 ms
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
    88 bytes stack frame, 104 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 88 bytes cumulative stack size
"""


def test_registers_spills_and_remarks_of_ptxas_are_read_by_kernel():
    found = ptx.parsed(PTXAS)
    assert found["one"] == ptx.Assembled(168, 0, 1, ())
    assert found["two"][:3] == (255, 104, 0)
    assert found["two"].notes == ("(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized",)


def test_ptxas_that_does_not_say_the_registers_is_refused():
    assert ptx.parsed("ptxas info    : 8 bytes gmem, 4 bytes cmem[3]\n") == {}  # a file of constants
    with pytest.raises(ValueError, match="does not say what registers are used by two"):
        ptx.parsed(PTXAS.replace("Used 255", "Uses 255"))


def test_shared_memory_is_read_from_how_a_kernel_is_launched():
    thunks = (
        "001: kCustomKernel [source | next=002 (1)] fwd grid: [32, 1, 4] threads: [128, 1, 1]  shared_memory: 81920 bytes\n"
    )
    assert cuda.launches(thunks + "002: kGemm [sink] other") == {"fwd": 81920}
    log = "%c7_i32 = arith.constant 7 : i32\n%c_1 = arith.constant 51288 : i32\ngpu.launch dynamic_shared_memory_size %c_1 {"
    assert cuda.dynamic(log) == 51288
    with pytest.raises(ValueError, match="does not say how much"):
        cuda.dynamic("nothing")
    with pytest.raises(ValueError, match="no constant"):
        cuda.dynamic(log.replace("%c_1 =", "%c_2 ="))


# The verdict


def case(**change) -> Case:
    return Case("attention", "causal", "gpu", lambda: None)._replace(**change)


@pytest.mark.parametrize(
    ("change", "target", "calls", "reason"),
    [
        ({}, H100, [Call("fwd", 232_448, registers=168, spills=0)], None),
        ({}, H100, [], "compiled, but without any Pallas kernel in it"),
        ({}, H100, [Call("fwd", 1, registers=255, spills=8)], "fwd: 8 bytes of registers spilled"),
        ({"spills": {"H100": 8}}, H100, [Call("fwd", 1, registers=255, spills=8)], None),
        (
            {"spills": {"*": 4}},
            H100,
            [Call("fwd", 1, registers=255, spills=8)],
            "fwd: 8 bytes of registers spilled, 4 declared",
        ),
        ({}, H100, [Call("fwd", 232_449, spills=0)], "fwd: 232,449 bytes of shared memory a block, 232,448 allowed"),
        ({}, TPU7X, [Call("fwd", 2**26 + 1)], "fwd: 67,108,865 bytes of VMEM, 67,108,864 allowed"),
        ({}, V6E, [Call("fwd", 2**26 + 1)], None),
        ({}, V6E, [Call("fwd", None)], None),
    ],
)
def test_spills_and_memory_over_the_limit_are_failures_unless_declared(change, target, calls, reason):
    row = results.judged(case(**change), target, 1.0, tuple(calls))
    assert (row.verdict, row.reason) == ((COMPILED, "") if reason is None else (FAILED, reason))
    assert results.from_json(json.loads(json.dumps(results.as_json(row)))) == row


def test_results_survive_json():
    found = Counts(19, None, 25, 23, 22, True, "MXU", 0.5, 0)
    row = Result("k", "c", "v6e", COMPILED, seconds=0.5, calls=(Call("n", 5, found), Call("m", None, notes=("slow",))))
    assert results.from_json(json.loads(json.dumps(results.as_json(row)))) == row


def test_a_reason_is_one_short_line_that_says_something():
    said = "\n\n  =====\nINTERNAL:\n   Mosaic failed   to compile\nmore\n"
    assert results.shortened(said) == "INTERNAL: Mosaic failed to compile"
    assert len(results.shortened("x" * 500)) == results.LONGEST
    assert pool.explained("Pass failed", "loc(x): error: 'op' is not supported on sm_80\n") == (
        "Pass failed: 'op' is not supported on sm_80"
    )
    assert pool.explained("Pass failed", "warning: nothing") == "Pass failed"
    log = "I0000 start\nF1124 x.cc:4] Check failed: rank == 2\n*** SIGABRT received\n@ 0x7f PC\n"
    assert pool.crashed(-6, log) == "the compiler crashed (SIGABRT): F1124 x.cc:4] Check failed: rank == 2"
    assert pool.crashed(-11, "@ 0x7f PC\n") == "the compiler crashed (SIGSEGV)"
    assert pool.crashed(1, "Traceback\nImportError: no libtpu\n") == "it ended with exit code 1: ImportError: no libtpu"


# The command


CASES = """
from pallas_kernels.cases import Case

def build():
    raise AssertionError("this is for the compiler's process")

CASES = (
    Case("odd", "causal forward", "tpu", build),
    Case("odd", "causal backward", "tpu", build, {"v5e": "it has no such instruction"}),
    Case("odd", "on a gpu", "gpu", build, {"*": "not written yet"}),
)
"""
# Stands in for the interpreter that has the compiler: answers as worker.py does, or crashes, hangs or fails to start.
STAND_IN = """#!{python}
import json, os, sys, time
target = sys.argv[3]
if target == "v5p":
    sys.exit("ImportError: there is no libtpu")
print(json.dumps({{"ready": {{"libtpu": "1.2"}}}}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if (job["name"], target) == ("causal forward", "v6e"):
        print("F1124 x.cc:4] Check failed: rank == 2", file=sys.stderr, flush=True)
        os.abort()
    if (job["name"], target) == ("causal forward", "TPU7x"):
        time.sleep(60)
    call = {{"name": "fwd.1", "memory": 77, "counts": None, "registers": None, "spills": None, "notes": []}}
    row = {{"kernel": job["kernel"], "case": job["name"], "target": target, "verdict": "compiled", "reason": ""}}
    print(json.dumps({{"result": {{**row, "seconds": 0.1, "calls": [call]}}}}), flush=True)
"""


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Cases in a module of their own, and an interpreter that stands in for both compilers'."""
    (tmp_path / "odd_cases.py").write_text(CASES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_cases", raising=False)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    monkeypatch.setattr(pool, "python", lambda implementation: stand_in)
    yield tmp_path
    sys.modules.pop("odd_cases", None)


def aot_run(*arguments: str) -> int:
    return aot.main(["--cases", "odd_cases", *arguments])


def test_everything_compiled_or_declared_is_exit_code_0(listed, capsys):
    assert aot_run("--targets", "v5e,h100", "--json", str(listed / "out.json")) == 0
    said = capsys.readouterr().out
    assert "[3/3]" in said and "odd, on a gpu: unsupported: not written yet" in said
    assert "1 compiled, 2 declared unsupported, 0 failed" in said
    kept = json.loads((listed / "out.json").read_text())
    assert kept["versions"] == {"libtpu": "1.2"}
    assert [(row["case"], row["target"], row["verdict"]) for row in kept["results"]] == [
        ("causal forward", "v5e", COMPILED),
        ("causal backward", "v5e", UNSUPPORTED),
        ("on a gpu", "H100", UNSUPPORTED),
    ]


def test_a_crash_or_a_hang_is_one_row_and_the_next_case_goes_on(listed, capsys):
    assert aot_run("--targets", "v6e,TPU7x", "--timeout", "5", "--jobs", "2") == 1
    said = capsys.readouterr().out
    assert "v6e   odd, causal forward: failed: the compiler crashed (SIGABRT): F1124 x.cc:4] Check failed: rank == 2" in said
    assert "TPU7x odd, causal forward: failed: no answer in 5 s" in said
    assert said.count("causal backward: compiled") == 2
    assert "2 compiled, 0 declared unsupported, 2 failed" in said


def test_a_compiler_that_does_not_start_fails_all_of_its_rows(listed, capsys):
    assert aot_run("--targets", "v5p") == 1
    said = capsys.readouterr().out
    assert said.count("the compiler does not start: it ended with exit code 1: ImportError: there is no libtpu") == 3
    assert "(v5p); odd, causal backward (v5p)" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--targets", "v6"], "no target 'v6'; there are: v5e, v5p, v6e, TPU7x, A100, H100, B200; did you mean v6e?"),
        (["--only", "cosal*"], "no case is like 'cosal*'; there are: causal forward, causal backward, on a gpu"),
        (["--only", "causal*", "--targets", "H100"], "none of these cases is for H100"),
        (["--quick", "--targets", "v6e"], "--quick chooses targets, and so does --targets: give one of them"),
        (["--json", "/no/such/folder/x.json"], "--json: there is no folder /no/such/folder"),
        (["--cases", "no_such_module"], "No module named 'no_such_module'"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_arguments_that_ask_for_nothing_are_one_line_and_exit_code_2(listed, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(pool, "Worker", None)  # nothing is compiled
    with pytest.raises(SystemExit) as ended:
        aot_run(*arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err == f"aot: {said}; see --help\n"


def test_cases_are_chosen_by_name_by_kernel_or_by_both(listed, capsys):
    assert aot_run("--only", "*FORWARD", "--quick", "--list") == 0
    assert capsys.readouterr().out == "v5e   odd, causal forward\nTPU7x odd, causal forward\n"
    assert aot_run("--only", "odd on*", "--only", "odd", "--targets", "H100,v6e", "--list") == 0
    assert capsys.readouterr().out.count("\n") == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('{"v5e"', '{"v7"'), "case 'causal backward' declares something for 'v7'; allowed: *, v5e, v5p, v6e, TPU7x"),
        (('{"v5e"', '{"H100"'), "declares something for 'H100'; allowed: *, v5e, v5p, v6e, TPU7x"),
        (('"on a gpu", "gpu"', '"on a gpu", "cuda"'), "case 'on a gpu' is for 'cuda'; allowed: tpu, gpu"),
        (('"causal forward"', '"causal backward"'), "there are two cases 'odd', 'causal backward'"),
    ],
)
def test_a_declaration_for_no_target_and_a_second_case_of_a_name_are_refused(listed, capsys, change, said):
    Path(listed / "odd_cases.py").write_text(CASES.replace(*change))
    with pytest.raises(SystemExit) as ended:
        aot_run()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_an_environment_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "ROOT", tmp_path)
    with pytest.raises(pool.WorkerError, match=r"there is no \.venv-cuda: make \.venv-cuda"):
        pool.python("gpu")


# The process that compiles, and what benchmarks ask of it


class StandIn:
    def compile(self, build):
        return build()


def entry(fails: bool = False):
    if fails:
        raise RuntimeError("Mosaic failed to compile\nat length")
    return 0.5, (Call("fwd", 5),)


def test_an_error_of_the_compiler_is_an_answer(listed):
    job = {"entry": f"{__name__}:entry", "arguments": {}}
    row = worker.answer(job, V6E, StandIn())
    assert (row.verdict, row.seconds, row.calls) == (COMPILED, 0.5, (Call("fwd", 5),))
    row = worker.answer({**job, "arguments": {"fails": True}}, V6E, StandIn())
    assert (row.verdict, row.reason) == (FAILED, "RuntimeError: Mosaic failed to compile")
    row = worker.answer({"module": "odd_cases", "kernel": "odd", "name": "on a gpu"}, H100, StandIn())
    assert (row.case, row.reason) == ("on a gpu", "AssertionError: this is for the compiler's process")


def test_static_counts_are_for_tpus_and_of_what_compiles(listed, monkeypatch):
    class Worker:
        def __init__(self, target, timeout):
            self.target = target

        def ask(self, job):
            verdict = FAILED if job["arguments"] else COMPILED
            return results.as_json(Result("", job["entry"], self.target.name, verdict, "too big", calls=(Call("fwd", 5),)))

        def end(self):
            pass

    monkeypatch.setattr(pool, "Worker", Worker)
    assert counts.static_counts("v6e", {"ours": counts.Entry("a:b")}) == {"ours": (Call("fwd", 5),)}
    with pytest.raises(RuntimeError, match="theirs does not compile for v6e: too big"):
        counts.static_counts("v6e", {"theirs": counts.Entry("a:b", {"size": 1})})
    with pytest.raises(ValueError, match="H100 is no TPU"):
        counts.static_counts("H100", {})


def test_targets_are_those_of_the_matrix_and_each_has_its_compiler():
    assert [t.name for t in targets.TARGETS] == ["v5e", "v5p", "v6e", "TPU7x", "A100", "H100", "B200"]
    assert {t.implementation for t in targets.named(targets.QUICK)} == {"tpu", "gpu"} == set(pool.COMPILERS)
    assert "--xla_jf_dump_to=/x" in tpu.environment(Path("/x"))["LIBTPU_INIT_ARGS"]
    assert cases.KERNELS
