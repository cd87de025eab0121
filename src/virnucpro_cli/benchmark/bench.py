"""The bench workflow: what packing buys on this device, how far the tool is from the device's limit, which settings to use.

Every figure is taken in one run, on the same sequences, through the same model code, in interleaved rounds.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import embed, report, scratch
from virnucpro_cli.benchmark import limits, modes, peers, workload
from virnucpro_cli.benchmark.modes import Mode
from virnucpro_cli.benchmark.workload import Workload
from virnucpro_cli.config import BenchConfig, EmbedConfig, resolve
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, counted, in_a_line, needs
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.esm2 import ESM2, exact_arithmetic
from virnucpro_cli.model.spec import stream_dtype
from virnucpro_cli.validation.agreement import relative_l2

ROUNDS = 3
SAME = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float8_e4m3fn: 1e-1}
"""How far the means of two ways of batching may be apart (relative L2, worst record) before the comparison is refused."""


def run_bench(config: BenchConfig, out: Console | None = None) -> report.RunReport:
    """Do what `virnucpro bench` does and return its report. Raises UserError for what the user can put right."""
    out = out or report.console(config.quiet)
    _check_places(config)
    exact_arithmetic()
    bench = _Bench(config, out)
    if bench.device.type == "cpu":
        devices.keep_freed_memory()  # as every run of embed does
    with scratch.folder() as folder:
        for load in bench.workloads(Path(folder)):
            bench.time(load)
        bench.time_backends()
        bench.time_peers()
    return bench.finish()


def bench_model(**options: Any) -> report.RunReport:
    """Benchmark from Python; options: the fields of `BenchConfig`, e.g. `model="150M", seconds=20`."""
    with devices.as_before():
        return run_bench(resolve(BenchConfig, None, {"quiet": True, **options}))


class _Bench:
    """The model under test, and the report as it grows."""

    def __init__(self, config: BenchConfig, out: Console):
        self.config, self.out = config, out
        self.device = devices.resolve_device(config.device)
        self.dtype = devices.resolve_dtype(config.dtype, self.device)
        self.backend = attention_backends.resolve(config.attention, self.device, self.dtype)
        name = config.model or ("esm2_t6_8M_UR50D" if self.device.type == "cpu" else "esm2_t33_650M_UR50D")
        found = locate.locate(name) or locate.locate(f"{locate.RANDOM_PREFIX}{name}")
        assert found is not None
        out.print(f"loading {name} on {devices.describe_device(self.device)}", style="dim")
        if found.seed is not None:
            assert found.spec is not None
            weights = found.spec.parameters * (4 + self.dtype.itemsize)
            devices.check_room(self.device, weights, f"Random weights of {found.spec.name}")
            state = model_weights.random_state(found.spec, found.seed, self.device)
            note = "random weights: speed does not depend on their values"
            self.loaded: embed.Loaded = (found.spec, state, (note,))
        else:
            self.loaded = model_weights.load(found)
        self.found, self.spec = found, self.loaded[0]
        self.model = ESM2(self.spec, self.loaded[1], self.dtype, self.device, self.backend)
        auto = devices.auto_token_budget(self.device.type, devices.free_memory(self.device), self.spec.hidden, 0)
        self.budgets = [auto if budget == "auto" else int(budget) for budget in config.token_budget]
        self.report = report.RunReport("bench", notes=[*self.loaded[2], *self.backend.notes])
        self.report.environment = {
            "virnucpro": virnucpro_cli.__version__,
            "torch": torch.__version__,
            "model": f"{self.spec.name} ({self.spec.size})",
            "weights": found.place,
            "device": devices.describe_device(self.device),
            "dtype": devices.describe_dtype(self.dtype),
            "attention": self.backend.name,
            "date": time.strftime("%Y-%m-%d"),
            "config": asdict(config),
        }
        self.main: Workload | None = None
        self.best_budget = self.budgets[0]

    @property
    def packed_wanted(self) -> bool:
        return self.config.packed or not self.config.unpacked

    @property
    def unpacked_wanted(self) -> bool:
        return self.config.unpacked or not self.config.packed

    def workloads(self, folder: Path) -> list[Workload]:
        """As many tokens as let everything be done within `seconds`, from the speed of a short probe."""
        dice = np.random.default_rng(0)
        probe = workload.made_up(
            "probe", workload.natural(2 * max(self.budgets), dice), folder, self.config.max_residues
        )
        mode = modes.packed(self.model, probe, max(self.budgets))[0]
        seconds = limits.best_of(mode.run, self.device, least=0.0, repeats=1)
        work = self.packed_wanted * len(self.budgets) + self.unpacked_wanted * 3.5 + 1.5
        kinds = 1 if self.config.fasta else 2
        tokens = mode.used / seconds * 0.7 * self.config.seconds / (work * kinds * (ROUNDS + 1))
        tokens = int(
            np.clip(tokens, (4 if self.device.type == "cpu" else 2) * max(self.budgets), 100 * max(self.budgets))
        )
        if self.config.fasta:
            return [workload.sampled(self.config.fasta, tokens, folder, self.config.max_residues)]
        return [
            workload.made_up("natural", workload.natural(tokens, dice), folder, self.config.max_residues),
            workload.made_up("fragments", workload.fragments(tokens, dice), folder, self.config.max_residues),
        ]

    def time(self, load: Workload) -> None:
        """All ways through one workload, in interleaved rounds; then the limits, the stages and a whole `embed`."""
        self.out.print(
            f"{load.name}: {counted(len(load.segments), 'record')}, {int(load.sizes.sum()):,} tokens", style="dim"
        )
        ways: list[Mode] = []
        best_packed = None
        if self.packed_wanted:
            made = [modes.packed(self.model, load, budget) for budget in self.budgets]
            ways += [mode for mode, *_ in made]
        if self.unpacked_wanted:
            budget = max(self.budgets)
            ways += [modes.padded(self.model, load, budget, by_length) for by_length in (False, True)]
        self._refuse_if_they_differ([mode.run() for mode in ways], load)
        times: dict[str, list[float]] = {mode.name: [] for mode in ways}
        for _ in range(ROUNDS):
            for mode in ways:
                times[mode.name].append(self._timed(mode.run))
        seconds = {name: float(np.median(each)) for name, each in times.items()}
        if self.packed_wanted:
            fastest = min(range(len(made)), key=lambda i: seconds[made[i][0].name])
            best_packed = made[fastest][0].name
        for mode in ways:
            self._row(load, mode, times[mode.name], seconds[best_packed or mode.name])
        if not self.packed_wanted:
            return
        if self.main is None:
            self.main, self.best_budget = load, self.budgets[fastest]
        rate = made[fastest][0].used / seconds[made[fastest][0].name]
        self._limits(load, made[fastest][0], rate)
        self._stages(load, made[fastest], seconds[made[fastest][0].name])

    def _refuse_if_they_differ(self, rows: list[torch.Tensor], load: Workload) -> None:
        for other in rows[1:]:
            worst = float(relative_l2(other.cpu().numpy(), rows[0].cpu().numpy()).max())
            if worst > SAME[self.dtype]:
                raise RuntimeError(f"the ways of batching {load.name} disagree by {worst:.1e}")

    def _row(self, load: Workload, mode: Mode, each: list[float], packed_seconds: float) -> None:
        seconds = float(np.median(each))
        self.report.tables.setdefault("Throughput", []).append({
            "workload": load.name, "mode": mode.name, "batches": mode.batches,
            "records/batch": len(load.segments) / mode.batches, "density": mode.density,
            "padding waste": 1 - mode.density, "tokens/s": mode.used / seconds,
            "residues/s": (mode.used - 2 * len(load.segments)) / seconds, "records/s": len(load.segments) / seconds,
            "spread": (max(each) - min(each)) / seconds, "packed is faster by": seconds / packed_seconds,
        })  # fmt: skip

    def _limits(self, load: Workload, mode: Mode, rate: float) -> None:
        found = limits.measure(self.spec, self.dtype, self.device, min(self.best_budget, 32768))
        attended = float((load.sizes.astype(np.float64) ** 2).sum())
        flop = self.spec.flops(float(mode.used), attended, self.spec.layers) / mode.used
        self.report.tables.setdefault("Limit", []).append({
            "workload": load.name, "GEMM TFLOP/s": found.gemm_rate / 1e12,
            "square GEMM TFLOP/s": found.peak_gemm_rate / 1e12,
            "copy GB/s": found.copy_rate / 1e9, "GEMM floor tokens/s": found.gemm_floor, "tokens/s": rate,
            "of the floor": rate / found.gemm_floor, "MFU (of the square GEMM)": flop * rate / found.peak_gemm_rate,
        })  # fmt: skip

    def _stages(self, load: Workload, made: Any, forward: float) -> None:
        """Seconds of each stage on its own, and of a whole `embed` in which they overlap."""
        mode, plan, collate, host = made
        batch = host[0].to(self.device)
        split = limits.breakdown(lambda: modes.mean_of_last(self.model, batch), self.device)
        whole = sum(split.values()) or 1.0
        collated = self._timed(lambda: [collate(pack) for pack in range(len(plan))])
        copied = self._timed(lambda: [one.to(self.device) for one in host])
        rows = mode.run().half()
        copied_out = self._timed(lambda: rows.cpu())
        settings = EmbedConfig(
            inputs=(load.path,), output=str(Path(load.path).with_suffix(".h5")), model=self.found.name,
            dtype=self.config.dtype, device=self.config.device, attention=self.config.attention,
            token_budget=self.best_budget, max_residues=self.config.max_residues, dedup=False, quiet=True,
            force_protein=True,
        )  # fmt: skip
        done = embed.run(settings, loaded=self.loaded)
        wall = sum(done.seconds[name] for name in ("index", "plan", "forward"))
        write = done.seconds.get("write (overlapped)", done.seconds.get("write", 0.0))
        hideable = collated + copied + copied_out + write
        exposed = max(done.seconds["forward"] - forward, 0.0)
        stages: dict[str, Any] = {"workload": load.name, "index": done.seconds["index"], "plan": done.seconds["plan"]}
        stages |= {"collate": collated, "copy in": copied}
        stages |= {f"forward: {kind}": forward * spent / whole for kind, spent in split.items()}
        stages |= {"copy out": copied_out, "write": write}
        self.report.tables.setdefault("Stages (s)", []).append(stages)
        self.report.tables.setdefault("Whole embed", []).append({
            "workload": load.name, "index + plan + forward (s)": wall, "bare forward (s)": forward,
            "tokens/s": mode.used / wall, "of the bare forward": forward / wall,
            "hidden by overlap": 1 - min(exposed / hideable, 1.0) if hideable else 1.0,
        })  # fmt: skip
        self.report.seconds[f"{load.name}: whole embed"] = wall

    def time_backends(self) -> None:
        """Every attention backend that can run here, on the first workload at its best budget."""
        if self.main is None or self.config.attention != "auto":
            return
        for name in attention_backends.BACKENDS:
            try:
                backend = attention_backends.resolve(name, self.device, self.dtype)
            except UserError:
                continue
            if self.device.type == "cuda" and name == "sdpa":
                continue  # a call per protein: for devices that have nothing else
            if backend.steps is self.backend.steps:
                model = self.model.with_attention(backend.attention)
            else:
                model = ESM2(self.spec, self.loaded[1], self.dtype, self.device, backend)
            mode = modes.packed(model, self.main, self.best_budget)[0]
            mode.run()
            each = [self._timed(mode.run) for _ in range(ROUNDS)]
            self.report.tables.setdefault("Attention backends", []).append(
                {"backend": name, "tokens/s": mode.used / float(np.median(each)), "budget": self.best_budget}
            )
            del model, mode  # a second copy of the weights, perhaps

    def time_peers(self) -> None:
        if not self.config.peers or self.main is None:
            return
        found, absent = peers.available(
            self.config.peers, self.spec, self.device, stream_dtype(self.dtype), self.best_budget
        )
        self.report.notes += absent
        ids = [[0, *text, 2] for text in self.main.token_ids()]
        ours = max(row["tokens/s"] for row in self.report.tables["Throughput"] if row["workload"] == self.main.name)
        for peer in found:
            self.out.print(f"peer: {peer.name}", style="dim")
            try:
                records, rate = self._peer_rate(peer, ids)
            except Exception as error:  # of another project's code
                self.report.notes.append(f"{peer.name}: {in_a_line(error)}")
                continue
            self.report.tables.setdefault("Peers", []).append({
                "peer": peer.name, "workload": self.main.name, "records": records, "tokens/s": rate,
                "packed is faster by": ours / rate,
            })  # fmt: skip

    def _peer_rate(self, peer: peers.Peer, ids: list[list[int]]) -> tuple[int, float]:
        """An eighth of the records, or all of them if there is time: how many, and tokens a second."""
        subset = ids[: max(len(ids) // 8, 8)]
        peer.run(subset[:8])
        seconds = self._timed(partial(peer.run, subset))
        if seconds < self.config.seconds / 20:
            subset = ids
            seconds = self._timed(partial(peer.run, subset))
        return len(subset), sum(map(len, subset)) / seconds

    def _timed(self, call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        modes.synchronize(self.device)
        return time.perf_counter() - started

    def finish(self) -> report.RunReport:
        tables = self.report.tables
        packed = [row for row in tables.get("Throughput", []) if row["mode"].startswith("packed")]
        if packed:
            self.report.packing = {"density": packed[0]["density"], "token budget": self.best_budget}
            self.report.rates = {
                "tokens/s": max(row["tokens/s"] for row in packed if row["workload"] == packed[0]["workload"])
            }
        if "Attention backends" in tables:
            best = max(tables["Attention backends"], key=lambda row: row["tokens/s"])["backend"]
        else:
            best = self.backend.name
        self.report.environment["recommended"] = {"token_budget": self.best_budget, "attention": best}
        for name, rows in tables.items():
            self.out.print(report.rows_table(name, rows))
        for note in self.report.notes:
            self.out.print(note, style="yellow")
        if packed:
            self.out.print(f"recommended here: --token-budget {self.best_budget} --attention {best}")
        if self.config.save_config:
            name = self.config.model or self.spec.name
            report.save(
                self.config.save_config,
                f"# virnucpro embed --config {self.config.save_config}\n# measured on {devices.describe_device(self.device)}, "
                f'{self.report.environment["date"]}\n[embed]\nmodel = "{name}"\ndtype = "{self.config.dtype}"\n'
                f'attention = "{best}"\ntoken_budget = {self.best_budget}',
            )
        if self.config.report:
            report.save(self.config.report, self.report.to_json())
        if self.config.plot:
            from virnucpro_cli.benchmark import plot

            plot.save(self.report, self.config.plot)
        return self.report


def failed_gates(found: report.RunReport, config: BenchConfig) -> list[str]:
    """Which of --min-speedup and --min-density were missed, in words."""
    failures = []
    first = found.tables["Throughput"][0]["workload"]
    in_file_order = [
        row for row in found.tables["Throughput"] if (row["workload"], row["mode"]) == (first, modes.FILE_ORDER)
    ]
    if config.min_speedup is not None:
        reached = in_file_order[0]["packed is faster by"]
        if reached < config.min_speedup:
            failures.append(
                f"speed-up over padding in file order on {first}: {reached:.2f} x, wanted {config.min_speedup} x"
            )
    if config.min_density is not None and not found.packing.get("density", 0.0) >= config.min_density:
        failures.append(f"density on {first}: {found.packing.get('density', 0.0):.4f}, wanted {config.min_density}")
    return failures


def _check_places(config: BenchConfig) -> None:
    written = {"report": config.report, "plot": config.plot, "config": config.save_config}
    report.check_places(written, [*config.fasta, *(locate.files_read(config.model) if config.model else [])])
    if config.plot:
        needs("matplotlib", "plots", "--plot")
