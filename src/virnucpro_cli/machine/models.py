"""The models workflow: what each model is, its licence, what of it is here and how fast it is. Nothing is fetched."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from virnucpro_cli import report
from virnucpro_cli.alphabet import ESM, INVALID, letters
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.machine.speeds import Speed, remembered
from virnucpro_cli.model import attention, locate
from virnucpro_cli.model.families import (
    DEMO,
    FAMILIES,
    SIZES,
    TABLE,
    by_name,
    emitted,
    family_of,
    parameters,
    short_name,
)
from virnucpro_cli.model.spec import Family, Licence, ModelSpec

LATER = "virnucpro models NAME says all of one."


class Here(NamedTuple):
    """Names of the device, dtype and attention that a run would use on this machine."""

    device: str
    dtype: str
    attention: str

    @property
    def kernels(self) -> str:
        """The steps around attention, by the name of their module in `kernels`."""
        return attention.STEPS.get(self.attention, "plain")


class Known(NamedTuple):
    """A published model. place: where its weights are on this machine, None if they are not; speeds: newest first."""

    spec: ModelSpec
    licence: Licence
    place: str | None
    speeds: list[Speed]

    def speed_in(self, here: Here | None) -> float | None:
        """Tokens a second on the device and in the dtype that a run would use, None if that was not measured."""
        alike = [each.rate for each in self.speeds if here and (each.device, each.dtype) == here[:2]]
        return alike[0] if alike else None


def show(name: str | None = None, as_json: bool = False) -> None:
    """Print the models, or those of a name, to standard output. Raises UserError for a name that is none."""
    specs, here, out = named(name), computing(), report.stdout()
    measured = remembered()
    models = [known(spec, measured) for spec in specs]
    if as_json:
        print(json.dumps([facts(model, here) for model in models]))
    elif len(models) == 1:
        out.print(about(models[0], here))
    else:
        for table in tables(models, here):
            out.print(table)
        for note in notes(models, here):
            out.print(note)


def named(name: str | None) -> list[ModelSpec]:
    """Every published model; with a name that model, or those of a family. Raises UserError for any other name."""
    if name is None:
        return [*SIZES.values()]
    if spec := by_name(name):
        return [spec]
    for key, family in FAMILIES.items():
        if _plain(name) in (_plain(key), _plain(family.TITLE)):
            return [*TABLE[key].models.values()]
    if name and Path(name).exists():
        remedy = f"virnucpro embed FASTA -o OUT.h5 --model {name} --dry-run says what it is."
        raise UserError(f"{name} is a path, and NAME is a published model or a family.", remedy)
    raise locate.unknown_model(name)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace(" ", "")


def computing() -> Here | None:
    """The device, dtype and attention that a run would use, None if nothing here can run."""
    try:
        device = devices.resolve_device("auto")
        dtype = devices.resolve_dtype("auto", device)
        backend = attention.resolve("auto", device, dtype)
    except UserError:
        return None
    return Here(devices.describe_device(device), devices.short_name(dtype), backend.name)


def known(spec: ModelSpec, measured: list[Speed]) -> Known:
    family, speeds = family_of(spec), [each for each in measured if each.model == spec.name]
    try:
        weights = locate.locate(spec.name)
    except UserError:  # half of them, which doctor speaks of
        weights = None
    return Known(spec, family.licence(spec), weights.place if weights else None, speeds)


def facts(model: Known, here: Here | None) -> dict[str, object]:
    """All that is known of a model, for --json."""
    spec, family, (licence, url, to_accept) = model.spec, family_of(model.spec), model.licence
    return {
        "name": short_name(spec), "full_name": spec.name, "family": family.TITLE, "parameters": parameters(spec),
        "layers": spec.layers, "width": spec.hidden, "heads": spec.heads, "letters": alphabet_of(family),
        "longest": spec.longest, "emit": emitted(spec), "licence": licence, "licence_url": url,
        "licence_to_accept": to_accept, "published": published(spec), "place": model.place,
        "device": here.device if here else None, "dtype": here.dtype if here else None,
        "attention": here.attention if here else None, "kernels": here.kernels if here else None,
        "tokens/s": model.speed_in(here), "measured": [each._asdict() for each in model.speeds],
    }  # fmt: skip


def alphabet_of(family: Family) -> str:
    """The letters that a family has tokens for, runs of them as A-I."""
    codes = letters("keep", family.READING or family.NUCLEOTIDES or ESM).codes
    there = [byte for byte in range(33, 127) if codes[byte] < INVALID and not chr(byte).islower()]
    capitals, others = ([b for b in there if chr(b).isupper() is wanted] for wanted in (True, False))
    runs: list[list[int]] = []
    for byte in capitals:
        if runs and byte == runs[-1][-1] + 1:
            runs[-1].append(byte)
        else:
            runs.append([byte])
    words = [chr(run[0]) if len(run) == 1 else f"{chr(run[0])}-{chr(run[-1])}" for run in runs]
    return " ".join([*words, *map(chr, others)])


def published(spec: ModelSpec) -> str:
    """Where the weights are published."""
    package = f"the package {locate.DEMO_WHEEL}"
    return package if spec == DEMO else f"https://huggingface.co/{family_of(spec).repository(spec)}"


def count_of(number: int) -> str:
    """A number of parameters in words: 651 M, 2.84 G."""
    return f"{number / 1e6:.3g} M" if number < 999.5e6 else f"{number / 1e9:.3g} G"


# --- as people see it ------------------------------------------------------------------------------------------------


def tables(models: list[Known], here: Here | None) -> Iterator[Table | report.Fitting]:
    """Families, their models, and where the weights are that are here."""
    names = ("family", "letters", "longest protein", "kernels here")
    families = report.columns_table("Families", names, names)
    for key in dict.fromkeys(model.spec.family for model in models):
        family, most = FAMILIES[key], TABLE[key].longest
        longest = "no limit" if most is None else f"{most:,} residues"
        families.add_row(family.TITLE, alphabet_of(family), longest, here.kernels if here else "none")
    yield families
    yield report.Fitting(_wide(models, here), lambda fits: _narrow(models, here))
    places = report.facts_table("On this machine")
    for model in models:
        if model.place:
            places.add_row(short_name(model.spec), model.place)
    if places.row_count:
        yield places


def _wide(models: list[Known], here: Here | None) -> Table:
    names = ("model", "size", "layers", "width", "licence", "tokens/s", "here")
    table = report.columns_table("Models", names, ("model", "licence", "here"))
    for model in models:
        spec, speed = model.spec, model.speed_in(here)
        table.add_row(
            short_name(spec), count_of(parameters(spec)), str(spec.layers), str(spec.hidden), _licence(model.licence),
            f"{speed:,.0f}" if speed else "", "yes" if model.place else "",
        )  # fmt: skip
    return table


def _narrow(models: list[Known], here: Here | None) -> Iterable[Table]:
    table = report.facts_table("Models")
    table.columns[0].no_wrap = True
    for model in models:
        spec, speed = model.spec, model.speed_in(here)
        rate = [f"{speed:,.0f} tokens/s"] if speed else []
        place = ["here"] if model.place else []
        words = [count_of(parameters(spec)), spec.size, _licence(model.licence), *rate, *place]
        table.add_row(short_name(spec), ", ".join(words))
    return [table]


def _licence(licence: Licence) -> str:
    return f"{licence.name.partition(' ')[0]} *" if licence.to_accept else licence.name


def notes(models: list[Known], here: Here | None) -> Iterator[str]:
    """Lines below the tables."""
    if any(model.licence.to_accept for model in models):
        yield "* Its licence has to be accepted before it is fetched: virnucpro fetch NAME --accept-licence."
    if here is None:
        yield "Nothing here can run a model: see virnucpro doctor."
        return
    yield f"A run here uses {here.device} in {here.dtype}, attention {here.attention}."
    if any(model.speed_in(here) is None for model in models):
        yield "virnucpro bench --model NAME measures tokens/s, and the last figure is kept for this table."
    yield LATER


def about(model: Known, here: Here | None) -> Table:
    """A table of all that is known of one model."""
    spec, family = model.spec, family_of(model.spec)
    table = report.facts_table(spec.name)
    limit = "no limit in the network"
    if spec.longest is not None:
        limit = f"{counted(spec.longest, 'residue')}; embed takes longer ones by windows"
    rows = {
        "family": family.TITLE,
        "name": short_name(spec),
        "parameters": f"{count_of(parameters(spec))}, without heads",
        "layers": f"{spec.layers}, numbered 1 to {spec.layers}; 0 is the embedding",
        "width": f"{spec.hidden}, {spec.heads} heads",
        "letters": f"{alphabet_of(family)}; others are read as X",
        "longest protein": limit,
        "--emit": f"{', '.join(emitted(spec))}, if the file has the heads",
        "licence": f"{model.licence}{', to be accepted before it is fetched' if model.licence.to_accept else ''}",
        "published": published(spec),
        "weights": model.place or locate.not_here(spec),
        "kernels here": _kernels(here),
        "tokens/s": "\n".join(map(_speed, model.speeds))
        or f"not measured here; virnucpro bench --model {short_name(spec)} does",
    }
    for row in rows.items():
        table.add_row(*row)
    return table


def _kernels(here: Here | None) -> str:
    if here is None:
        return "none: see virnucpro doctor"
    steps = {"fused": "fused steps", "portable": "portable fused steps", "plain": "plain steps of PyTorch"}[
        here.kernels
    ]
    return f"{steps}, attention {here.attention}, on {here.device} in {here.dtype}"


def _speed(speed: Speed) -> str:
    return f"{speed.rate:,.0f} on {speed.device} in {speed.dtype}, attention {speed.attention}, {speed.date}"
