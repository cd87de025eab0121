"""The bench workflow: what packing buys here, how far the tool is from the device's limit, which settings to use.

Every figure is taken in one run, on the same sequences, through the same model code, in interleaved rounds.
"""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import embed, report, scratch
from virnucpro_cli.alphabet import CLS, EOS
from virnucpro_cli.benchmark import limits, modes, peers, workload
from virnucpro_cli.benchmark.limits import timed
from virnucpro_cli.benchmark.modes import Mode
from virnucpro_cli.benchmark.workload import Workload
from virnucpro_cli.config import BenchConfig, EmbedConfig, resolve
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, counted, in_a_line, needs
from virnucpro_cli.machine import speeds
from virnucpro_cli.machine.speeds import Speed
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.families import SIZES, build, family_of, flops, parameters
from virnucpro_cli.model.families import reading as reading_of_kind
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.model.spec import check_longest, stream_dtype
from virnucpro_cli.validation.agreement import relative_l2

ROUNDS = 3
SAME = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float8_e4m3fn: 1e-1}
"""Largest relative L2 between the means of a record by two ways of batching; past it, the comparison is refused."""


def run_bench(config: BenchConfig, out: Console | None = None) -> report.RunReport:
    """Do what `virnucpro bench` does and return its report. Raises UserError for what the user can put right."""
    out = out or report.console(config.quiet)
    written = {"report": config.report, "plot": config.plot, "config": config.save_config}
    report.check_places(written, [*config.fasta, *(locate.files_read(config.model) if config.model else [])])
    if config.plot:
        needs("matplotlib", "plots", "--plot")
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
        weights = locate.locate(name) or locate.locate(f"{locate.RANDOM_PREFIX}{name}")
        assert weights is not None
        if family_of(spec := model_weights.spec_of(weights)).READING is None:
            remedy = "Name a model of proteins, or time `virnucpro embed --report` on your own nucleotides."
            raise UserError(f"bench times proteins, and {spec.name} reads nucleotides.", remedy)
        out.print(f"loading {name} on {devices.describe_device(self.device)}", style="dim")
        self.weights, self.loaded = weights, self._loaded(weights)
        self.spec, state, notes = self.loaded
        check_longest(self.spec, config.max_residues)
        self.model = build(self.spec, state, self.dtype, self.device, self.backend)
        auto = devices.auto_token_budget(self.device.type, devices.free_memory(self.device), self.spec.hidden, 0)
        self.budgets = [auto if budget == "auto" else int(budget) for budget in config.token_budget]
        self.best_budget = self.budgets[0]
        self.main: Workload | None = None
        both = config.packed == config.unpacked
        self.packed_wanted, self.unpacked_wanted = config.packed or both, config.unpacked or both
        self.report = report.RunReport("bench", notes=[*notes, *self.backend.notes])
        self.report.environment = {
            "virnucpro": virnucpro_cli.__version__,
            "torch": torch.__version__,
            "model": f"{self.spec.name} ({self.spec.size})",
            "weights": weights.place,
            "device": devices.describe_device(self.device),
            "dtype": devices.describe_dtype(self.dtype),
            "attention": self.backend.name,
            "date": time.strftime("%Y-%m-%d"),
            "config": asdict(config),
        }

    def _loaded(self, weights: locate.Weights) -> embed.Loaded:
        if weights.seed is None:
            return model_weights.load(weights)
        spec = weights.spec
        assert spec is not None
        needed = parameters(spec) * (4 + self.dtype.itemsize)
        devices.check_room(self.device, needed, f"Random weights of {spec.name}")
        state = model_weights.random_state(spec, weights.seed, self.device)
        return spec, state, ("random weights: speed does not depend on their values",)

    def _add(self, title: str, row: dict[str, Any]) -> None:
        self.report.tables.setdefault(title, []).append(row)

    def workloads(self, folder: Path) -> list[Workload]:
        """The number of tokens that let everything be done within `seconds`, from the speed of a short probe."""
        dice, largest, longest = np.random.default_rng(0), max(self.budgets), self.config.max_residues
        reading = reading_of_kind(self.spec)
        probe = workload.made_up("probe", workload.natural(2 * largest, dice), folder, longest, reading=reading)
        mode = modes.packed(self.model, probe, largest)[0]
        seconds = limits.best_of(mode.run, self.device, least=0.0, repeats=1)
        turns = self.packed_wanted * len(self.budgets) + self.unpacked_wanted * 3.5 + 1.5
        turns *= (1 if self.config.fasta else 2) * (ROUNDS + 1)
        tokens = mode.used / seconds * 0.7 * self.config.seconds / turns
        tokens = int(np.clip(tokens, (4 if self.device.type == "cpu" else 2) * largest, 100 * largest))
        if self.config.fasta:
            return [workload.sampled(self.config.fasta, tokens, folder, longest, reading=reading)]
        kinds = {workload.NATURAL: workload.natural, "fragments": workload.fragments}
        made_up = partial(workload.made_up, folder=folder, max_residues=longest, reading=reading)
        return [made_up(name, lengths(tokens, dice)) for name, lengths in kinds.items()]

    def time(self, load: Workload) -> None:
        """All ways through one workload, in interleaved rounds; then the limits, the stages and a whole `embed`."""
        records = counted(len(load.segments), "record")
        self.out.print(f"{load.name}: {records}, {int(load.sizes.sum()):,} tokens", style="dim")
        packed = [modes.packed(self.model, load, budget) for budget in self.budgets if self.packed_wanted]
        ways = [each[0] for each in packed]
        for by_length in (False, True) if self.unpacked_wanted else ():
            ways.append(modes.padded(self.model, load, max(self.budgets), by_length))
        self._refuse_if_they_differ([mode.run() for mode in ways], load)
        times: dict[str, list[float]] = {mode.name: [] for mode in ways}
        for _ in range(ROUNDS):
            for mode in ways:
                times[mode.name].append(timed(mode.run, self.device))
        seconds = {name: float(np.median(each)) for name, each in times.items()}
        fastest = min(range(len(packed)), key=lambda i: seconds[ways[i].name], default=None)
        for mode in ways:
            faster = seconds[mode.name] / seconds[mode.name if fastest is None else ways[fastest].name]
            self._throughput(load, mode, times[mode.name], faster)
        if fastest is None:
            return
        if self.main is None:
            self.main, self.best_budget = load, self.budgets[fastest]
        self._limits(load, ways[fastest], seconds[ways[fastest].name])
        self._stages(load, packed[fastest], seconds[ways[fastest].name])

    def _refuse_if_they_differ(self, rows: list[torch.Tensor], load: Workload) -> None:
        for other in rows[1:]:
            worst = float(relative_l2(other.cpu().numpy(), rows[0].cpu().numpy()).max())
            if worst > SAME[self.dtype]:
                raise RuntimeError(f"the ways of batching {load.name} disagree by {worst:.1e}")

    def _throughput(self, load: Workload, mode: Mode, each: list[float], faster: float) -> None:
        seconds, records = float(np.median(each)), len(load.segments)
        self._add("Throughput", {
            "workload": load.name, "mode": mode.name, "batches": mode.batches, "records/batch": records / mode.batches,
            "density": mode.density, "padding waste": 1 - mode.density, "tokens/s": mode.used / seconds,
            "residues/s": (mode.used - 2 * records) / seconds, "records/s": records / seconds,
            "spread": (max(each) - min(each)) / seconds, "packed is faster by": faster,
        })  # fmt: skip

    def _limits(self, load: Workload, mode: Mode, seconds: float) -> None:
        of_device = limits.measure(self.spec, self.dtype, self.device, min(self.best_budget, 32768))
        attended, rate = float((load.sizes.astype(np.float64) ** 2).sum()), mode.used / seconds
        flop = flops(self.spec, float(mode.used), attended, self.spec.layers)
        self._add("Limit", {
            "workload": load.name, "GEMM TFLOP/s": of_device.gemm_rate / 1e12,
            "square GEMM TFLOP/s": of_device.peak_gemm_rate / 1e12, "copy GB/s": of_device.copy_rate / 1e9,
            "GEMM floor tokens/s": of_device.gemm_floor, "tokens/s": rate, "of the floor": rate / of_device.gemm_floor,
            "MFU (of the square GEMM)": flop / seconds / of_device.peak_gemm_rate,
        })  # fmt: skip

    def _stages(self, load: Workload, packed: modes.Packed, forward: float) -> None:
        """Seconds of each stage on its own, and of a whole `embed` in which they overlap."""
        mode, plan, collate, host = packed
        batch = host[0].to(self.device)
        split = limits.breakdown(lambda: modes.mean_of_last(self.model, batch), self.device)
        rows = mode.run().half()
        collated = timed(lambda: [collate(pack) for pack in range(len(plan))], self.device)
        copied_in = timed(lambda: [one.to(self.device) for one in host], self.device)
        copied_out = timed(lambda: rows.cpu(), self.device)
        settings = EmbedConfig(
            inputs=(load.path,), output=str(Path(load.path).with_suffix(".h5")), model=self.weights.name,
            dtype=self.config.dtype, device=self.config.device, attention=self.config.attention,
            token_budget=self.best_budget, max_residues=self.config.max_residues, long="truncate", dedup=False,
            quiet=True, force_protein=True,
        )  # fmt: skip
        seconds = embed.run(settings, loaded=self.loaded).seconds
        wall = sum(seconds[name] for name in ("index", "plan", "forward"))
        write = seconds.get("write (overlapped)", seconds.get("write", 0.0))
        hideable = collated + copied_in + copied_out + write
        exposed = max(seconds["forward"] - forward, 0.0)
        shares = {f"forward: {kind}": forward * each / (sum(split.values()) or 1.0) for kind, each in split.items()}
        self._add("Stages (s)", {
            "workload": load.name, "index": seconds["index"], "plan": seconds["plan"], "collate": collated,
            "copy in": copied_in, **shares, "copy out": copied_out, "write": write,
        })  # fmt: skip
        self._add("Whole embed", {
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
            if self.device.type == "cuda" and name == "sdpa":
                continue  # a call per protein: for devices that have nothing else
            try:
                backend = attention_backends.resolve(name, self.device, self.dtype)
            except UserError:
                continue
            if backend.steps is self.backend.steps:
                model = self.model.with_attention(backend.attention)
            else:
                model = build(self.spec, self.loaded[1], self.dtype, self.device, backend)
            mode = modes.packed(model, self.main, self.best_budget)[0]
            mode.run()
            seconds = float(np.median([timed(mode.run, self.device) for _ in range(ROUNDS)]))
            row = {"backend": name, "tokens/s": mode.used / seconds, "budget": self.best_budget}
            self._add("Attention backends", row)
            del model, mode  # a second copy of the weights, perhaps

    def time_peers(self) -> None:
        if not self.config.peers or self.main is None:
            return
        if not family_of(self.spec).PEERS:
            self.report.notes.append(f"no peers are timed: they run ESM-2, another network than {self.spec.name}")
            return
        stream = stream_dtype(self.dtype)
        there, absent = peers.installed(self.config.peers, stream)
        self.report.notes += absent
        ids = [[CLS, *text, EOS] for text in self.main.token_ids()]
        ours = max(row["tokens/s"] for row in self.report.tables["Throughput"] if row["workload"] == self.main.name)
        for peer in there:
            self.out.print(f"peer: {peer.label}", style="dim")
            try:
                run = peer.make(self.spec, self.device, torch.float32 if peer.fp32 else stream, self.best_budget)
                records, rate = self._peer_rate(run, ids)
            except Exception as error:  # of another project's code
                self.report.notes.append(f"{peer.label}: {in_a_line(error)}")
                continue
            self._add("Peers", {
                "peer": peer.label, "workload": self.main.name, "records": records, "tokens/s": rate,
                "packed is faster by": ours / rate,
            })  # fmt: skip

    def _peer_rate(self, run: peers.Run, ids: list[list[int]]) -> tuple[int, float]:
        """An eighth of the records, or all of them if there is time: how many, and tokens a second."""
        subset = ids[: max(len(ids) // 8, 8)]
        run(subset[:8])
        seconds = timed(lambda: run(subset), self.device)
        if seconds < self.config.seconds / 20:
            subset = ids
            seconds = timed(lambda: run(subset), self.device)
        return len(subset), sum(map(len, subset)) / seconds

    def _remember(self, load: str, rate: float) -> None:
        """Keep tokens a second of a published model for `virnucpro models`, if they are of lengths that all have."""
        if load == workload.NATURAL and self.spec.name in SIZES:
            device, dtype = devices.describe_device(self.device), devices.short_name(self.dtype)
            date = self.report.environment["date"]
            speeds.remember(Speed(self.spec.name, device, dtype, self.backend.name, rate, date))

    def finish(self) -> report.RunReport:
        """Say what is best here, print the tables, and write the files that were asked for."""
        config, tables, best = self.config, self.report.tables, self.backend.name
        packed = [row for row in tables.get("Throughput", []) if row["mode"].startswith("packed")]
        if packed:
            rate = max(row["tokens/s"] for row in packed if row["workload"] == packed[0]["workload"])
            self.report.packing = {"density": packed[0]["density"], "token budget": self.best_budget}
            self.report.rates = {"tokens/s": rate}
            self._remember(packed[0]["workload"], rate)
        if backends := tables.get("Attention backends"):
            best = max(backends, key=lambda row: row["tokens/s"])["backend"]
        self.report.environment["recommended"] = {"token_budget": self.best_budget, "attention": best}
        for name, rows in tables.items():
            self.out.print(report.rows_table(name, rows))
        for note in self.report.notes:
            self.out.print(note, style="yellow")
        if packed:
            self.out.print(f"recommended here: --token-budget {self.best_budget} --attention {best}")
        if config.save_config:
            measured = f"measured on {devices.describe_device(self.device)}, {self.report.environment['date']}"
            report.save(
                config.save_config,
                f"# virnucpro embed --config {config.save_config}\n# {measured}\n[embed]\n"
                f'model = "{config.model or self.spec.name}"\ndtype = "{config.dtype}"\n'
                f'attention = "{best}"\ntoken_budget = {self.best_budget}',
            )
        if config.report:
            report.save(config.report, self.report.to_json())
        if config.plot:
            from virnucpro_cli.benchmark import plot

            plot.save(self.report, config.plot)
        return self.report


def failed_gates(found: report.RunReport, config: BenchConfig) -> list[str]:
    """Gates of --min-speedup and --min-density that were missed, in words."""
    failures = []
    rows = found.tables["Throughput"]
    first, density = rows[0]["workload"], found.packing.get("density", 0.0)
    if config.min_speedup is not None:
        reached = next(row for row in rows if row["mode"] == modes.FILE_ORDER)["packed is faster by"]
        if reached < config.min_speedup:
            over = f"speed-up over padding in file order on {first}"
            failures.append(f"{over}: {reached:.2f} x, wanted {config.min_speedup} x")
    if config.min_density is not None and density < config.min_density:
        failures.append(f"density on {first}: {density:.4f}, wanted {config.min_density}")
    return failures
