"""The self-test: its verdicts, which cases a model needs, and who tests them."""

import importlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import MLLA, prepare_for_inference, use_kernels
from models.kernels import dispatch, inference, self_test, self_test_pool, verdicts
from models.kernels.dispatch import KernelsUnavailableError
from models.kernels.self_test import KERNELS, estimate_seconds, find_verdicts, kernel_cases, run_self_test
from models.kernels.verdicts import Case
from models.mlla import MLLABlock
from models.rope import position_tables

problems = pytest.importorskip("models.kernels.problems", exc_type=ImportError)

SIZES = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 0}


CPU = torch.device("cpu")
CASES: list[Case] = [("mixer", 32, 32, 6), ("mlp", 32, 32, 6), ("stem_conv", 8, 32, 6)]
COMPILING = "Compiling kernels for cpu (first start on this machine, about %s s)"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The lines of the log, as in a first process, which has said nothing yet; a CPU counts as a kind of GPU."""
    lines: list[str] = []
    monkeypatch.setattr(dispatch.logger, "info", lambda line, *parts, **_: lines.append(line % parts))
    dispatch.log_fallback_once.cache_clear()
    monkeypatch.setattr(dispatch, "VERDICTS", {})
    monkeypatch.setattr(verdicts, "describe", lambda device: f"a {device.type}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lines


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> list[Case]:  # noqa: ARG001, for its set-up
    """The cases that were tested in this process, of which `mlp` fails."""
    cases: list[Case] = []

    def solve(case: Case, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG001
        cases.append(case)
        return "it is wrong" if case[0] == "mlp" else ""

    monkeypatch.setattr(dispatch, "solve", solve)
    return cases


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "VERDICTS", {})


def test_a_right_kernel_passes_and_leaves_random_numbers_alone(device: torch.device) -> None:
    state = torch.get_rng_state()
    assert dispatch.failed_self_test("mixer", device, torch.float32, 32, 32, 6) == ""
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_or_failing_kernel_does_not(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("models.kernels.ops", exc_type=ImportError)
    right: Callable[..., tuple[torch.Tensor, ...]] = ops.conv_silu

    def wrong(*args: object) -> tuple[torch.Tensor, ...]:
        active, before = right(*args)
        return active * 1.01, before

    def failing(*_: object) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("a compiler's words\nin two lines")

    for replacement, words in ((wrong, "is off by"), (failing, "in two lines")):
        monkeypatch.setattr(ops, "conv_silu", replacement)
        assert words in problems.find_error("mixer", device, torch.float32, 32, 32, rows=6, batch=2)


def launched(kernel: str, shape: tuple[int, int, int, int], patch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Return what Triton would compile for tokens (B, H, W, C), forward and backward, without computing anything."""
    from triton.runtime import interpreter

    found = set()

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:  # noqa: ARG001
        values = dict(zip(function.arg_names, args, strict=False)) | settings
        for name in function.kwargs.get("do_not_specialize") or ():
            del values[name]
        found.add((function.__name__, *((name, specialization(name, value)) for name, value in values.items())))

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = torch.bfloat16) -> torch.Tensor:  # noqa: ARG001
        return torch.zeros(shape, dtype=of, requires_grad=kernel not in problems.INFERENCE_ONLY)

    patch.setattr(interpreter.InterpretedFunction, "run", run)
    fused, _, inputs = problems.problem(kernel, draw, shape, 32)
    results = fused(*inputs)
    if results[0].requires_grad:
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        torch.autograd.grad(results, trained, [torch.ones_like(result) for result in results])
    return found


def specialization(name: str, value: Any) -> Any:
    """Return what of an argument a compiled kernel depends on; constants have names in upper case."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    is_size = isinstance(value, int) and not isinstance(value, bool) and name.islower() and name != "num_warps"
    return (value == 1, value % 16 == 0) if is_size else value


@pytest.mark.usefixtures("replaceable_launches")
@pytest.mark.parametrize("kernel", ["mixer", "mlp_branch", "wide_conv", "stem_conv", "inference_mixer"])
def test_other_grids_and_batches_need_no_other_compiled_kernels(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    if device.type != "cpu":
        pytest.skip("only Triton's interpreter takes kernels that are not compiled")
    tested = launched(kernel, (16, 17, problems.COLUMNS, 64), monkeypatch)
    for batch, side in ((16, 32), (24, 28)):
        assert launched(kernel, (batch, side, side, 64), monkeypatch) <= tested


def test_cases_of_a_model() -> None:
    """Grids of 17 x 17 tokens at width 16, 9 x 9 at 32; each case once, none for modules that are not "auto"."""
    model = MLLA(**SIZES)  # type: ignore[arg-type]
    assert kernel_cases(model, 68, KERNELS) == []
    expected = [("mixer", 16, 16, 17), ("mixer", 32, 16, 12)]
    expected += [("mlp_branch", 16, 32, 17), ("mlp_branch", 32, 32, 12), ("stem_conv", 8, 32, 6)]
    assert kernel_cases(use_kernels(model), 68, ["training"]) == [*expected, ("wide_conv", 128, 32, 17)]
    assert {case[3] for case in kernel_cases(model, (16, 400), KERNELS)} == {6}
    model.layers[0].blocks[0].out_proj.register_forward_hook(lambda *_: None)
    assert ("mixer", 16, 16, 17) not in kernel_cases(model, 68, KERNELS)  # it falls back in any case
    assert kernel_cases(use_kernels(model, "triton"), 68, KERNELS) == []


def test_cases_of_each_use() -> None:
    """Wider MLPs than 128 channels have no kernel of their own."""
    model = use_kernels(MLLA(**{**SIZES, "embed_dim": 128, "num_heads": (4, 8)}))  # type: ignore[arg-type]

    def cases(*uses: str) -> list[str]:
        return [f"{kernel} {width}" for kernel, width, _, _ in kernel_cases(model, 224, uses)]

    trained = ["mixer 128", "mixer 256", "mlp_branch 128", "mlp_branch 256", "stem_conv 64", "wide_conv 1024"]
    prepared = ["inference_mixer 128", "inference_mixer 256", "inference_mlp 128", "inference_mlp 256"]
    prepared += ["stem_conv_relu 64", "wide_conv 1024"]
    assert cases("training") == trained
    assert cases("inference") == sorted(["mlp 128", *trained])
    assert cases("prepared") == prepared
    assert cases("training", "prepared") == sorted({*trained, *prepared})
    assert cases("one_image") == []
    few = kernel_cases(model, 112, ["one_image"])
    assert [case[:2] for case in few] == [
        (name, width) for name in ("few_tokens_mixer", "few_tokens_mlp") for width in (128, 256)
    ]


@pytest.mark.parametrize("use", KERNELS)
def test_a_model_asks_for_the_cases_of_its_use(device: torch.device, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    asked: set[Case] = set()

    def verdict(kernel: str, _device: torch.device, _dtype: torch.dtype, *sizes: int) -> str:
        asked.add((kernel, *sizes))  # type: ignore[arg-type]
        return ""

    monkeypatch.setattr(dispatch, "self_test_verdict", verdict)
    model = use_kernels(MLLA(**SIZES)).to(device).train(use == "training")  # type: ignore[arg-type]
    cases = kernel_cases(model, 16, [use])
    monkeypatch.setattr(inference, "MANY_PIXELS", 0)
    is_prepared = use in ("prepared", "one_image")
    if is_prepared:
        model = prepare_for_inference(model, torch.float16)
    if use == "prepared":
        monkeypatch.setattr(inference, "FEW_PRODUCTS", 0)
    autocast = torch.autocast(device.type, torch.float16, enabled=is_prepared)
    with torch.set_grad_enabled(use == "training"), autocast:
        model(torch.zeros(2, 3, 16, 16, device=device))
    if use == "one_image":
        asked = {case for case in asked if case[0].startswith("few_tokens")}  # the others are of "prepared"
    assert sorted(asked) == cases


def test_kernels_for_16_bits_alone_are_not_tested_in_float32() -> None:
    model = use_kernels(MLLA(**SIZES))  # type: ignore[arg-type]
    left_out = set(kernel_cases(model, 16, ["prepared"])) - set(kernel_cases(model, 16, ["prepared"], torch.float32))
    assert left_out == {("stem_layer", 8, 32, 6)}
    assert kernel_cases(model, 16, ["one_image"]) != []
    assert kernel_cases(model, 16, ["one_image"], torch.float32) == []


def test_a_wrong_kernel_of_prepared_blocks_falls_back(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """That half of a block is eager, with one line, and the results are right."""
    ops = pytest.importorskip("models.kernels.ops", exc_type=ImportError)
    right = ops.mlp
    monkeypatch.setattr(ops, "mlp", lambda *args: right(*args) * 1.01)
    block = use_kernels(MLLABlock(16, 1)).to(device).eval()
    inputs = torch.randn(2, 6, 6, 16, device=device), position_tables(6, 6, 16, device)
    prepared = prepare_for_inference(block, torch.float32)
    with torch.no_grad():
        results = [prepared(*inputs) for _ in range(2)]
        expected = use_kernels(block, "torch")(*inputs)
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    (line,) = log
    assert line.startswith("Triton kernels: falls back to eager PyTorch: the inference_mlp kernel's result is off by")


def test_set_up_tests_once_for_all_starts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    solved: list[tuple[object, ...]] = []
    monkeypatch.setattr(problems, "find_error", lambda *case, **_: solved.append(case) or "")
    monkeypatch.setattr(self_test, "num_workers", lambda *_: 1)
    model = use_kernels(MLLA(**SIZES)).to(device).eval()  # type: ignore[arg-type]
    run_self_test(model, torch.float32, 16, ["inference"])
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16, device=device))  # finds all verdicts
    new_process(monkeypatch)
    run_self_test(model, torch.float32, 16, ["inference"])
    line = (
        "Triton kernels passed their self-test: mixer, mlp, mlp_branch, stem_conv, wide_conv; widths 8, 16, 32, 128; "
    )
    assert log[0].startswith("Compiling kernels for ")
    assert [text.partition(" (")[0] for text in log[1:]] == [line + "float32"] * 2
    assert log[1].endswith(" s)")
    assert log[2].endswith(" (remembered)")
    assert len(solved) == len(set(solved)) == len(kernel_cases(model, 16, ["inference"]))


def test_set_up_logs_what_falls_back(device: torch.device, monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    monkeypatch.setattr(problems, "find_error", lambda kernel, *_, **__: "it is wrong" if kernel == "mlp" else "")
    monkeypatch.setattr(self_test, "num_workers", lambda *_: 1)
    model = use_kernels(MLLA(**SIZES)).to(device)  # type: ignore[arg-type]
    run_self_test(model, torch.float32, 16, ["inference"])
    assert log[1:] == ["Triton kernels: falls back to eager PyTorch: it is wrong"]


def test_set_up_without_triton(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_self_test(MLLA(**SIZES), torch.float32, 16, ["training"])  # type: ignore[arg-type]
    run_self_test(use_kernels(MLLA(**SIZES).to("meta"), "triton"), torch.float32, 16, ["training"])  # type: ignore[arg-type]
    run_self_test(use_kernels(MLLA(**SIZES)), torch.float32, 16, ["training"])  # type: ignore[arg-type]
    assert log == []
    with pytest.raises(KernelsUnavailableError, match=r"MODEL\.KERNELS triton: there is no Triton for the device cpu"):
        run_self_test(use_kernels(MLLA(**SIZES), "triton"), torch.float32, 16, ["training"])  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "missing_triton", lambda _: "")
    run_self_test(use_kernels(MLLA(**SIZES)), torch.float64, 16, ["training"])  # type: ignore[arg-type]
    assert log == ["Triton kernels: falls back to eager PyTorch: torch.float64 is not supported"]


def test_failures_are_tested_again_at_the_next_start(
    tested: list[Case], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {CASES[0]: "", CASES[1]: "it is wrong", CASES[2]: ""}
    for _ in range(2):
        assert find_verdicts(CASES, CPU, torch.float32) == expected
    assert tested == CASES
    new_process(monkeypatch)
    assert dispatch.self_test_verdict("mixer", CPU, torch.float32, 32, 32, 6) == ""
    assert find_verdicts(CASES, CPU, torch.float32) == expected
    assert tested == [*CASES, CASES[1]]
    assert log == [COMPILING % 16, "Compiling kernels for cpu (about 2 s)"]
    assert find_verdicts(CASES[:1], CPU, torch.float16) == {CASES[0]: ""}
    assert tested[-1] == CASES[0]


def test_the_first_process_of_a_machine_tests_for_all(
    tested: list[Case], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds the failures as well; a third waits until they are there."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    expected = find_verdicts(CASES, CPU, torch.float32)
    new_process(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_verdicts(CASES, CPU, torch.float32) == expected
    new_process(monkeypatch)
    content = verdicts.cache_file().read_text()
    verdicts.cache_file().unlink()
    found: list[dict[Case, str]] = []
    waits = threading.Thread(target=lambda: found.append(find_verdicts(CASES, CPU, torch.float32)))
    waits.start()
    time.sleep(0.1)
    assert not found
    verdicts.cache_file().write_text(content)
    waits.join()
    assert found == [expected]
    assert tested == CASES
    assert log == [COMPILING % 16]


@pytest.mark.parametrize("is_late", [True, False])
def test_other_processes_test_on_their_own_when_they_cannot_wait(
    tested: list[Case], monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    if is_late:
        clock = iter(range(0, 10**6, 50))
        monkeypatch.setattr(self_test.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(self_test.time, "sleep", lambda _: None)
    else:
        monkeypatch.setattr(verdicts, "can_save", lambda _: False)
    find_verdicts(CASES, CPU, torch.float32)
    assert tested == CASES


def test_what_does_not_pass_in_a_worker_is_tested_here(
    tested: list[Case], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def workers(solve: Callable[[Case], str], cases: list[Case], **settings: Any) -> set[Case]:
        calls.append((solve.keywords, settings["num_workers"], settings["device"]))  # type: ignore[attr-defined]
        settings["advance"]()
        return set(cases[:1])

    monkeypatch.setattr(self_test, "num_workers", lambda *_: 2)
    monkeypatch.setattr(self_test, "passed_in_workers", workers)
    assert set(find_verdicts(CASES, CPU, torch.float32)) == set(CASES)
    assert tested == CASES[1:]
    assert calls == [({"device": CPU, "dtype": torch.float32}, 2, CPU)]
    assert log == [COMPILING % 26]


@pytest.mark.usefixtures("replaceable_launches")
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("other", ["norm", "mlp"], ids=["passes", "fails"])
def test_code_compiled_meanwhile_takes_kernels_for_right_and_is_compiled_again_if_one_is_wrong(
    tested: list[Case], device: torch.device, monkeypatch: pytest.MonkeyPatch, rank: str, other: str
) -> None:
    """While workers test CASES[0], code asks for its verdict and for another one's, which is tested later."""
    resets: list[str] = []
    x = torch.ones(1, 8, 8, 16, device=device)

    def compile_code() -> None:
        for kernel in ("mixer", other):
            assert dispatch.failed_self_test(kernel, device, torch.float32, 32, 32, 6) == ""
        assert not tested
        problems.ops.gelu(x)  # not launched: the interpreter would say so
        resets.append("compiled")

    def workers(_: Any, cases: list[Case], **settings: Any) -> set[Case]:
        settings["meanwhile"]()
        return set(cases)

    def no_launch(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(verdicts, "can_save", lambda _: not resets)  # a second process does not wait for the first
    monkeypatch.setattr(self_test, "num_workers", lambda *_: 2)
    monkeypatch.setattr(self_test, "passed_in_workers", workers)
    monkeypatch.setattr(self_test, "kernel_cases", lambda *_: CASES[:1])
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append("reset"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.runtime.interpreter.InterpretedFunction.run", no_launch)
        run_self_test(torch.nn.Linear(1, 1, device=device), torch.float32, 32, ["training"], compile_code)
    assert resets == ["compiled", "reset"][: 1 + (other == "mlp")]
    assert tested == [(other, 32, 32, 6)]
    assert not dispatch.ASSUMED


def test_without_workers_all_is_tested_here(
    tested: list[Case], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_workers(*_: object, **__: object) -> set[Case]:
        raise OSError("no more processes")

    monkeypatch.setattr(self_test, "num_workers", lambda *_: 2)
    monkeypatch.setattr(self_test, "passed_in_workers", no_workers)
    find_verdicts(CASES, CPU, torch.float32)
    assert tested == CASES
    assert log[1:] == ["Compiling kernels in this process, since the workers failed (OSError: no more processes)"]


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, gib = torch.device("cuda"), 2**30
    monkeypatch.setattr(self_test.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def workers(num_cases: int, device: torch.device = gpu, free: int = 100 * gib) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
        return self_test.num_workers(CASES[:1] * num_cases, device)

    assert (workers(14), workers(5), workers(2), workers(14, CPU)) == (8, 5, 1, 1)
    assert (workers(14, free=7 * gib), workers(14, free=gib)) == (3, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers(14) == 8  # the other processes wait
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert workers(14) == 2


def test_estimated_seconds() -> None:
    """12 + 2 + 2 seconds of work: one after the other, or beside each other after 14 seconds of start."""
    assert (estimate_seconds(CASES, 1), estimate_seconds(CASES, 3)) == (16, 26)
    assert estimate_seconds(CASES[:1] * 8, 4) == 14 + 24


@pytest.mark.parametrize("change", ["", "mode", "rank", "tested", "no Triton"])
def test_imports_of_the_workers_begin_early_at_the_first_start(
    change: str,
    log: list[str],  # noqa: ARG001, for its set-up
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(self_test, "start_server", lambda: started.append(True))
    if change != "no Triton":
        monkeypatch.setattr(dispatch, "missing_triton", lambda _: "")
    if change == "rank":
        monkeypatch.setenv("LOCAL_RANK", "1")
    if change == "tested":
        verdicts.save(CPU, torch.float32, {CASES[0]: ""})
    self_test.expect_self_test("torch" if change == "mode" else "auto", CPU)
    assert started == ([True] if not change else [])


def test_a_server_that_was_not_needed_ends() -> None:
    self_test_pool.start_server()
    folder = Path(self_test_pool.SERVER._forkserver_address).parent
    assert folder.is_dir()
    run_self_test(torch.nn.Linear(1, 1), torch.float32, 32, ["training"])
    assert self_test_pool.SERVER._forkserver_pid is None
    assert not folder.exists()


def test_a_server_whose_socket_is_no_file_leaves_the_current_folder_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in Python 3.10.0 to 3.10.8 on Linux."""
    (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(self_test_pool, "IMPORTED", [])
    self_test_pool.start_server()
    monkeypatch.setattr(self_test_pool.SERVER, "_forkserver_address", "\0listener-1-0")
    self_test_pool.stop_server()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    monkeypatch.undo()
    self_test_pool.SERVER._forkserver_address = None


def test_kernels_of_other_packages_are_tested_once_for_a_state_of_their_files(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their users get the verdicts, and log a failure themselves, which the next start tests again."""
    monkeypatch.setattr(dispatch, "missing_triton", lambda _: "")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "other_kernels.py").write_text(
        "tested, verdicts = [], []\n"
        "def find_error(*kernel):\n    tested.append(kernel)\n    return 'it is wrong' if kernel[0] == 'b' else ''\n"
        "def set_verdict(*verdict):\n    verdicts.append(verdict)\n"
    )
    other: Any = importlib.import_module("other_kernels")
    for changed, tested in ((False, ["a", "b"]), (False, ["b"]), (True, ["a", "b"])):
        new_process(monkeypatch)
        other.tested.clear()
        other.verdicts.clear()
        if changed:
            (tmp_path / "neighbor.py").touch()
        run_self_test(
            torch.nn.Linear(1, 1), torch.float32, 32, ["training"], None, ["other_kernels:a", "other_kernels:b"]
        )
        assert other.tested == [(name, CPU) for name in tested]
        assert other.verdicts == [("a", CPU, ""), ("b", CPU, "it is wrong")]
    assert not any("wrong" in line for line in log)
