"""The command line. Heavy levels are imported inside the commands that train or sample."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner.cli.completion import run_names
from runner.core import output
from runner.core.command_line import fluxrun_command as typed
from runner.core.errors import DiskError, ExitCode, Fault, FluxrunError, InterruptedRunError, SpecError, is_disk_error

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from runner.jobs.job import Job
    from runner.preflight.finding import Finding


MANY = 3  # places beside the first one, from which on a fault is told once for all of them


class Group(click.Group):
    """Prints every refusal in one place, with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpecError as error:
            with output.ignore_lost_output():
                _echo_faults(error.faults)
                click.echo(f"{_count(len(error.faults), 'fault')}; nothing was started", err=True)
            ctx.exit(error.exit_code)
        except FluxrunError as error:
            with output.ignore_lost_output():
                click.echo(f"fluxrun: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # `fluxrun results | head`
            ctx.exit(output.exit_code_of_closed_pipe())
        except OSError as error:
            if not (error.filename and is_disk_error(error)):
                raise
            with output.ignore_lost_output():
                click.echo(
                    f"fluxrun: {error.filename}: {error.strerror}; the same command goes on once that is mended",
                    err=True,
                )
            ctx.exit(DiskError.exit_code)
        except KeyboardInterrupt:
            with output.ignore_lost_output():
                click.echo(f"{os.linesep if sys.stderr.isatty() else ''}fluxrun: stopped by Ctrl-C", err=True)
            ctx.exit(InterruptedRunError.exit_code)


def _echo_faults(faults: Sequence[Fault]) -> None:
    """On a terminal with the line and a caret below each. One that many files have is told once."""
    from runner.cli.excerpts import excerpts
    from runner.preflight.finding import same_in

    shown = excerpts(faults) if sys.stderr.isatty() else {}
    alike: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        alike.setdefault((fault.key, fault.message), []).append(fault)
    for fault in faults:
        first, *rest = alike[fault.key, fault.message]
        many = len(rest) >= MANY
        if many and fault is not first:
            continue
        click.echo(fault, err=True)
        if fault in shown:
            click.echo(shown[fault], err=True)
        if many:
            click.echo(f"    {same_in([(one.file, one.line) for one in rest])}", err=True)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fluxrun")
def main() -> None:
    """Queue FLUX LoRA and pivotal-tuning runs, and go to bed."""


def _runs_folder(ctx: click.Context, _: click.Parameter, runs: Path) -> Path:
    """Refuses a path where no folder can be made."""
    from runner.spec.run_names import LONGEST_RUNS_FOLDER

    if not ctx.resilient_parsing and (length := len(os.fsencode(runs.absolute()))) > LONGEST_RUNS_FOLDER:
        raise click.BadParameter(
            f"a path of {length:,} bytes; at most {LONGEST_RUNS_FOLDER:,} are allowed; name a folder nearer to the root"
        )
    there = next(path for path in (runs, *runs.absolute().parents) if os.path.exists(path) or path == path.parent)
    if not (ctx.resilient_parsing or there.is_dir()):
        raise click.BadParameter(f"{runs} cannot be there: {there} is a file; name another folder")
    return runs


def must_exist(runs: Path) -> Path:
    if not runs.is_dir():
        raise click.BadParameter(
            f"there is no folder {str(runs)!r}; name the one that `fluxrun queue` has put its runs into",
            param_hint="--runs",
        )
    return runs


def _existing(ctx: click.Context, param: click.Parameter, runs: Path) -> Path:
    return runs if ctx.resilient_parsing else must_exist(_runs_folder(ctx, param, runs))


_runs_option = partial(
    click.option, "--runs", type=click.Path(path_type=Path, file_okay=False), default="runs", envvar="FLUXRUN_RUNS",
    show_default=True, help="The runs folder.",
)  # fmt: skip
runs_option = _runs_option(callback=_runs_folder)
existing_runs_option = _runs_option(callback=_existing)  # for commands that read what runs have left there


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
specs_argument = click.argument("specs", nargs=-1, required=True, type=click.Path(path_type=Path))


@main.command()
@specs_argument
@runs_option
@json_option
@click.option("--gpus", help="GPU numbers, e.g. 0,1: one run each; `cpu` forces the CPU. Default: all GPUs.")
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where runs run."
)
@click.option("--slots", type=click.IntRange(1, 64), default=1, show_default=True, help="Runs at a time on a CPU.")
@click.option("--retries", type=click.IntRange(0), default=2, show_default=True, help="Tries after a crash, per run.")
@click.option("--stop-at", metavar="HH:MM", help="Save and stop at this time; the same command goes on.")
@click.option("--fail-fast", is_flag=True, help="Stop the queue at the first run that fails.")
@click.option("--allow-commands", is_flag=True, help="Run what a spec's notify.command says.")
@click.option("--dry-run", is_flag=True, help="The same as `fluxrun plan`.")
@click.option("--fresh", is_flag=True, help="Move an existing run folder of another spec aside.")
@click.option(
    "--no-check", is_flag=True, help="Do not look at pictures, base, disk and logins first (`fluxrun check`)."
)
@click.pass_context
def queue(
    ctx: click.Context, specs: tuple[Path, ...], runs: Path, as_json: bool, gpus: str | None, engine: str, slots: int,
    retries: int, stop_at: str | None, fail_fast: bool, allow_commands: bool, dry_run: bool, fresh: bool, no_check: bool,
) -> None:  # fmt: skip
    """Run a batch: validate all, plan all, then run what is not done.

    A SPEC is a file, or a folder (every *.toml in it). Typing the same command again means "go on".
    """
    if engine != "local":
        raise click.BadParameter(
            f"{engine!r} is not available yet; runs go to this machine's slots", param_hint="--engine"
        )
    if dry_run:
        ctx.invoke(plan, specs=specs, runs=runs, as_json=as_json, gpus=gpus, fresh=fresh)
        return
    ctx.with_resource(output.ignore_lost_output())
    from runner.core.files import make_folder
    from runner.core.signals import StopRequest, next_time
    from runner.engine.progress import Screen
    from runner.engine.slot_filling import start_workers
    from runner.engine.slots import make_slots, on_gpus
    from runner.engine.supervisor import run_queue
    from runner.jobs import timing
    from runner.jobs.prepare import notify_faults, prepare_jobs

    try:
        deadline = next_time(stop_at) if stop_at else None
    except ValueError:
        raise click.BadParameter(f"{stop_at!r} is not a time of day; write HH:MM", param_hint="--stop-at") from None
    with StopRequest(deadline, interrupt_on_second=False) as stop:
        jobs = prepare_jobs(list(specs), runs, fetch=True, fresh=fresh)
        if refused := notify_faults(jobs, allow_commands):
            raise SpecError(refused)
        try:
            places = make_slots(gpus, slots, max((job.spec.compute.gpus for job in jobs), default=1), runs)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--gpus") from None
        screen = Screen()
        todo = _without_done(jobs, screen)
        with start_workers(places, len(todo)) as workers:  # they import their libraries meanwhile
            if todo and not no_check and not _all_well(todo, runs, gpus, slots):
                ctx.exit(2)
            for job in todo:
                if job.verdict.state == "changed":
                    screen.line(f"{job.plan.name}: the old run now is {job.run.archive()}")
            try:
                make_folder(runs)
            except OSError as error:
                raise click.BadParameter(
                    f"{runs} cannot be made ({error.strerror}); name another folder", param_hint="--runs"
                ) from None
            code = run_queue(todo, runs, places, screen, stop, retries=retries, fail_fast=fail_fast, workers=workers)
        with suppress(OSError):  # the runs folder may be gone, and with it what they took
            timing.remember_timing(todo, on_gpu=on_gpus(places))
    if as_json:
        _print_records(runs, {job.plan.name for job in jobs})
    ctx.exit(code)


def _all_well(jobs: list[Job], runs: Path, gpus: str | None, slots: int) -> bool:
    """`fluxrun check` of what is to run: its warnings and errors on stderr, and whether there is no error."""
    from runner.preflight.check import check, seen_of

    found = [one for one in check(seen_of(jobs), (), runs, gpus, slots) if one.level != "note"]
    errors = sum(one.level == "error" for one in found)
    _echo_findings(found, err=True)
    if errors:
        click.echo(f"{_count(errors, 'error')}; nothing was started (--no-check starts in spite of them)", err=True)
    return errors == 0


def _echo_findings(found: Iterable[Finding], *, err: bool) -> None:
    from runner.cli.excerpts import excerpts

    found = list(found)
    told = [one.fault for one in found if one.fault and one.level != "note"]
    shown = excerpts(told) if (sys.stderr if err else sys.stdout).isatty() else {}
    for one in found:
        first, *more = one.lines()
        for line in (first, *([shown[one.fault]] if one.fault in shown else []), *more):
            click.echo(line, err=err)


@main.command()
@click.argument("names", nargs=-1, metavar="[RUN]...", shell_complete=run_names)
@existing_runs_option
def stop(names: tuple[str, ...], runs: Path) -> None:
    """Stop runs, or with none named every queue on this runs folder: each saves at its next step; `queue` goes on."""
    from runner.cli.stop import stop_queues, stop_run

    for line in [stop_run(runs, name) for name in names] if names else stop_queues(runs):
        click.echo(line)


@main.command("_train", hidden=True)
@click.option("--parent", type=int, help="Die with this process.")
@click.option("--gpus")
@click.pass_context
def train(ctx: click.Context, parent: int | None, gpus: str | None) -> None:
    """What a queue starts for each slot: trains the runs named on stdin."""
    from runner.core.process_identity import exit_with_parent
    from runner.core.signals import StopRequest

    if parent is not None:
        exit_with_parent(parent)
    code: int = ExitCode.STOPPED
    ctx.with_resource(output.ignore_lost_output())
    gc.disable()  # half a million objects come with the imports, and stay; `preload_libraries` enables it again
    with StopRequest() as stop, suppress(KeyboardInterrupt):  # a second signal may come when the run has ended already
        from runner.engine.worker_main import main as train_all

        code = train_all(gpus, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # everything is closed; taking the libraries apart would only keep the next run waiting for the card


def _without_done(jobs: list[Job], screen: Any) -> list[Job]:
    todo = []
    for job in jobs:
        if job.verdict.state == "done":
            screen.line(f"{job.plan.name}: skipped, done ({job.verdict.reason})")
        else:
            todo.append(job)
    return todo


@main.command()
@specs_argument
@runs_option
@json_option
@click.option("--gpus", help="`cpu`: memory is estimated for a CPU. Default: for a GPU.")
@click.pass_context
def plan(
    ctx: click.Context, specs: tuple[Path, ...], runs: Path, as_json: bool, gpus: str | None, fresh: bool = False
) -> None:
    """Validate and print the plan; touches nothing, needs no GPU and no torch."""
    from runner.core import hardware
    from runner.jobs import cache_hits, card_fit, timing
    from runner.jobs.prepare import inspect_specs, jobs_of, prepare_jobs
    from runner.plan import description

    on_gpu = gpus != "cpu"
    here = on_gpu and hardware.NVIDIA.is_dir()  # where runs would go from here, whose times are wanted

    if sys.stdout.isatty() and not as_json:
        from runner.cli import plan_view
        from runner.report.tables import console

        seen, faults = inspect_specs(list(specs), runs, fetch=False, fresh=fresh)
        if shown := jobs_of(seen):
            cached = cache_hits.lines(shown, runs, on_gpu=here)
            times = timing.estimate_times(shown, runs, on_gpu=here)
            plan_view.draw(console(), shown, times, cached, time.time(), on_gpu=on_gpu)
        if faults:
            raise SpecError(faults)
        return
    estimates = card_fit.Estimates(on_gpu=on_gpu)
    jobs: list[Job] = []
    errors: list[dict[str, Any]] = []
    try:
        jobs = prepare_jobs(list(specs), runs, fetch=False, fresh=fresh)
    except SpecError as error:
        if not as_json:
            raise
        errors = [{"file": str(f.file), "line": f.line, "key": f.key, "message": f.message} for f in error.faults]
    if as_json:
        rows = [
            {
                **card_fit.with_memory(description.as_json(job.plan), job, estimates),
                "spec": str(job.file),
                "state": job.verdict.state,
                "reason": job.verdict.reason,
                "cache": cache_hits.as_json(hits),
                "time": vars(took),
            }
            for job, took, hits in zip(
                jobs,
                timing.estimate_times(jobs, runs, on_gpu=here),
                cache_hits.cache_hits_of(jobs, runs, on_gpu=here),
                strict=True,
            )
        ]
        click.echo(json.dumps({"runs": rows, "errors": errors}, indent=1))
        ctx.exit(2 if errors else 0)
    from runner.cli.plan_view import sizes_line, sweep_line

    cached = cache_hits.lines(jobs, runs, on_gpu=here)
    for job in jobs:
        click.echo(f"{job.plan.name}  ({job.file})  {job.verdict.state}: {job.verdict.reason}")
        if job.source.swept:
            click.echo(f"  {'sweep':<15}{sweep_line(job.source.swept)}")
        click.echo(f"  {'images':<15}{sizes_line(job.plan.sizes)}")
        for phase in job.plan.phases:
            click.echo("  " + _phase_line(description.describe(phase)))
        for line in card_fit.lines(job, estimates):
            click.echo(f"  {line}")
        if job.plan.name in cached:
            click.echo(f"  {cached[job.plan.name]}")
        for note in job.plan.notes:
            click.echo(f"  note: {note}")
    click.echo(f"{_count(len(jobs), 'run')}, {sum(job.plan.steps for job in jobs)} steps")


def _phase_line(facts: dict[str, Any]) -> str:
    span = f"steps {facts['start'] + 1}-{facts['stop']}" if facts["stop"] > facts["start"] else ""
    trains = ", ".join(
        f"{part['what']}{' in ' + '+'.join(part['encoders']) if 'encoders' in part else ''} "
        f"({_number(part['parameters'])} parameters)"
        for part in facts["trains"]
    )
    return f"{facts['name']:<15}{span:<16}{trains or 'trains nothing'}; on the device: {', '.join(facts['resident'])}"


def _number(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@main.command()
@click.argument("names", nargs=-1, metavar="[RUN]...", shell_complete=run_names)
@existing_runs_option
@json_option
@click.option("--watch", is_flag=True, help="Redraw every second, until Ctrl-C.")
def status(names: tuple[str, ...], runs: Path, as_json: bool, watch: bool) -> None:
    """What each run is doing."""
    from runner.runs.run import find_runs

    def states() -> list[dict[str, Any]]:
        return [{**run.state(), "name": run.name} for run in find_runs(runs) if not names or run.name in names]

    unknown = set(names) - {row["name"] for row in states()}
    if unknown:
        raise click.BadParameter(f"no such run in {runs}: {', '.join(sorted(unknown))}", param_hint="RUN")
    if as_json:
        click.echo(json.dumps(states(), indent=1))
        return
    from runner.report.tables import console, status_table

    screen = console()
    if not watch:
        _print_parts(screen, status_table(states(), screen.width))
        return
    from rich.live import Live

    from runner.cli.watch import view

    with (
        suppress(KeyboardInterrupt),  # the way to end it
        Live(view(runs, names, screen.width), console=screen, auto_refresh=False, vertical_overflow="visible") as live,
    ):
        while True:
            time.sleep(1)
            live.update(view(runs, names, screen.width), refresh=True)


def _print_parts(screen: Console, parts: Iterable[RenderableType]) -> None:
    """Tables as they are, lines in full."""
    from rich.text import Text

    for part in parts:
        screen.print(part, soft_wrap=isinstance(part, Text))


@main.command()
@existing_runs_option
@json_option
@click.option("--csv", "as_comma", is_flag=True, help="CSV on stdout, with a column for every spec key.")
@click.option("--sort", default="name", show_default=True, metavar="KEY", help="A column, or a key of the spec.")
def results(runs: Path, as_json: bool, as_comma: bool, sort: str) -> None:
    """The results index as a table: runs, the spec keys in which they differ, and how they did."""
    from runner.runs.index import Record, as_csv, distinguishing_keys, sort_records
    from runner.runs.index import results as read

    records = read(runs)
    if sort not in {*Record.__dataclass_fields__, *(key for record in records for key in record.spec)}:
        raise click.BadParameter(f"{sort!r}; there are {', '.join(Record.__dataclass_fields__)}", param_hint="--sort")
    records = sort_records(records, sort)
    if as_comma:
        click.echo(as_csv(records), nl=False)
    elif as_json:
        click.echo(json.dumps([asdict(record) for record in records], indent=1))
    else:
        from runner.report.tables import console, results_table

        screen = console()
        _print_parts(screen, results_table(records, distinguishing_keys(records), screen.width))


def _print_records(runs: Path, names: set[str]) -> None:
    from runner.runs.index import results as read

    click.echo(json.dumps([asdict(record) for record in read(runs) if record.name in names], indent=1))


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...", shell_complete=run_names)
@existing_runs_option
@click.option("--prompt", "prompts", multiple=True, help="With the tokens' names as in the spec. Default: the spec's.")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures per prompt.")
@click.option("--seed", type=int, help="Of the first picture; the next ones count up. Default: the spec's.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps. Default: the spec's.")
@click.option("--scale", default=1.0, show_default=True, help="Strength of the LoRA.")
@click.option("--gpus", help="A GPU's number, or `cpu`.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="A folder. Default: each RUN's samples/.")
def sample(
    names: tuple[str, ...], runs: Path, prompts: tuple[str, ...], count: int, seed: int | None, steps: int | None, scale: float,
    gpus: str | None, out: Path | None,
) -> None:  # fmt: skip
    """Pictures from runs' exports, by stock diffusers.

    Several runs are drawn with the same prompts and seeds; several pictures make a contact sheet.
    """
    from runner.cli.sample import sample_runs

    for path in sample_runs(runs, names, prompts, count=count, seed=seed, steps=steps, scale=scale, gpus=gpus, out=out):
        click.echo(path)


@main.command()
@existing_runs_option
@click.option("--port", default=6006, show_default=True)
@click.pass_context
def board(ctx: click.Context, runs: Path, port: int) -> None:
    """TensorBoard on the runs folder, until Ctrl-C."""
    import subprocess

    from runner.tracking.hparams import write_board

    write_board(runs)
    command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    with subprocess.Popen(command) as server:
        try:
            code = server.wait()
        except KeyboardInterrupt:  # the way to end it
            server.terminate()
            code = 0
    ctx.exit(code)


@main.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from-command",
    "command",
    metavar="COMMAND",
    help="A command line of train_dreambooth_lora_flux_advanced.py, or - for stdin.",
)
@click.option(
    "--template", type=click.Choice(["pivotal", "lora", "inversion"]), help="What it trains. Default: pivotal."
)
@click.option("--short", is_flag=True, help="Only the keys that people change most.")
@click.option(
    "--card", metavar="GIB|auto", help="Set what makes it fit a card of so much memory, or the one that is here."
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder: source, captions, resolution and buckets as it has them.",
)
def new(
    file: Path, command: str | None, template: str | None, short: bool, card: str | None, pictures: Path | None
) -> None:
    """Write a commented spec; FILE must not exist yet. Its schema, for editors, is put beside it."""
    from runner.newspec.file import NewSpecRequest, write_new_spec
    from runner.newspec.template import SCHEMA, NewError
    from runner.spec.json_schema import schema_text

    if file.exists():
        raise click.BadParameter(f"{file} exists; name another file", param_hint="FILE")
    others = [name for name, given in (("--template", template), ("--short", short), ("--pictures", pictures)) if given]
    if command is not None and others:
        raise click.UsageError(f"--from-command does not go with {', '.join(others)}: the command says what it trains")
    text = sys.stdin.read() if command == "-" else command
    try:
        made = write_new_spec(NewSpecRequest(file, template or "pivotal", text, short, card, pictures))
    except NewError as error:
        raise click.BadParameter(str(error), param_hint=error.option) from None
    from runner.core.files import output_folder, write_text

    output_folder(file)
    write_text(file, made.text)
    write_text(file.parent / SCHEMA, schema_text())
    for note in made.notes:
        click.echo(f"{file}: {note}", err=True)
    click.echo(f"{file}: `{typed('plan', file)}` checks it", err=True)


@main.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A file. Default: stdout.")
def schema(out: Path | None) -> None:
    """JSON Schema of a spec, for editors: a line `#:schema ./FILE` at a spec's top turns completion on."""
    from runner.core.files import output_folder, write_text
    from runner.spec.json_schema import schema_text

    if out is None:
        click.echo(schema_text(), nl=False)
    else:
        output_folder(out)
        write_text(out, schema_text())


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@existing_runs_option
@json_option
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A PNG: the runs' pictures side by side.")
def compare(names: tuple[str, ...], runs: Path, as_json: bool, out: Path | None) -> None:
    """Runs side by side: the spec keys that differ, how they did, the held-out loss at each noise level, pictures."""
    from runner.report import compare as comparing
    from runner.report.tables import console

    found = comparing.compare(runs, names)
    if out is not None:
        comparing.write_sheet(runs, names, out)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        screen = console()
        _print_parts(screen, comparing.as_tables(found, screen.width))
    if out is not None:
        click.echo(str(out), err=True)


@main.command()
@existing_runs_option
def report(runs: Path) -> None:
    """Write the results page, RUNS/index.html: one file that opens without a network."""
    from runner.report.page import write_report

    click.echo(write_report(runs))


@main.command("export")
@click.argument("name", metavar="RUN", shell_complete=run_names)
@existing_runs_option
@click.option("--step", type=click.IntRange(min=0), help="From the checkpoint of this step. Default: the newest.")
@click.option("--push", is_flag=True, help="Upload them, as hub.repo and hub.private say.")
@click.option("--gpus", help="A GPU's number, or `cpu`.")
@click.pass_context
def export_again(ctx: click.Context, name: str, runs: Path, step: int | None, push: bool, gpus: str | None) -> None:
    """Write a run's exports again, whatever state it is in."""
    ctx.with_resource(output.ignore_lost_output())
    from runner.cli.export import write_exports
    from runner.core.events import EventLog
    from runner.engine.progress import Screen

    screen = Screen()
    event_log = EventLog(lambda event: screen.show("", event))
    for path in write_exports(runs, name, step, gpus=gpus, push_too=push, event_log=event_log):
        click.echo(path)


@main.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--to", type=click.Choice(["diffusers", "kohya"]), required=True, help="The layout wanted.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Default: FILE's name and the layout.")
@click.option("--leave-out", is_flag=True, help="Convert the rest of a file with a T5 LoRA, biases or norms in it.")
def convert(file: Path, to: str, out: Path | None, leave_out: bool) -> None:
    """A FLUX.1 LoRA from elsewhere in diffusers' layout, or in the original one (kohya, ComfyUI).

    Reads what kohya's sd-scripts, OneTrainer, ai-toolkit, x-flux, diffusers, ComfyUI and Black Forest Labs write.
    """
    from runner.export.convert import convert as write

    made = write(file, to, out, leave_out=leave_out)
    for note in made.notes:
        click.echo(f"{made.file}: {note}", err=True)
    click.echo(f"{made.file}: read back; the largest difference of a weight's change is {made.error:.2g}", err=True)
    click.echo(made.file)


@main.command()
@specs_argument
@runs_option
@json_option
@click.option("--gpus", help="GPU numbers, e.g. 0,1, or `cpu`, as for `queue`. Default: all GPUs.")
@click.option("--slots", type=click.IntRange(1, 64), default=1, show_default=True, help="Runs at a time on a CPU.")
@click.option("--step", is_flag=True, help="Also train a step or two of each shape, and measure time and memory.")
@click.option("--allow-commands", is_flag=True, help="What a spec's notify.command says will be run.")
@click.option("--fresh", is_flag=True, help="An existing run folder of another spec will be moved aside.")
@click.pass_context
def check(
    ctx: click.Context, specs: tuple[Path, ...], runs: Path, as_json: bool, gpus: str | None, slots: int, step: bool,
    allow_commands: bool, fresh: bool,
) -> None:  # fmt: skip
    """Everything that can be known before the night: the plan, every picture and caption, the base's files, disk,
    memory, GPUs, logins, versions. `queue` does it first by itself. Exit code 2 where something is wrong.
    """
    from runner.jobs.prepare import inspect_specs, jobs_of, notify_faults
    from runner.preflight.check import check as look
    from runner.preflight.check import check_folders
    from runner.preflight.finding import in_order

    if step:  # which trains
        ctx.with_resource(output.ignore_lost_output())
    seen, faults = inspect_specs(list(specs), runs, fetch=True, fresh=fresh)
    found = look(seen, [*faults, *notify_faults(jobs_of(seen), allow_commands)], runs, gpus, slots)
    found = in_order([*found, *check_folders(seen)])
    if step and not any(one.level == "error" for one in found):
        from runner.preflight.trial import try_steps

        found += try_steps(seen, gpus)
    counts = {level: sum(one.level == level for one in found) for level in ("error", "warning", "note")}
    if as_json:
        names = [one.spec.name for one in seen]
        click.echo(
            json.dumps({"runs": names, "findings": [one.as_json() for one in found], "counts": counts}, indent=1)
        )
    else:
        _echo_findings(found, err=False)
        told = ", ".join(_count(number, level) for level, number in counts.items())
        click.echo(f"{_count(len(seen), 'run')}: {told}")
    ctx.exit(2 if counts["error"] else 0)


@main.group(invoke_without_command=True)
@runs_option
@json_option
@click.pass_context
def cache(ctx: click.Context, runs: Path, as_json: bool) -> None:
    """What the shared cache of latents and text embeddings holds."""
    from runner.cli import cache as cache_entries

    ctx.obj = runs, as_json
    if ctx.invoked_subcommand is not None:
        return
    kinds = cache_entries.listing(must_exist(runs))
    if as_json:
        click.echo(json.dumps(cache_entries.as_json(kinds), indent=1))
        return
    from runner.report.tables import console

    console().print(cache_entries.as_table(kinds))


@cache.command("prune")
@click.option("--days", type=click.FloatRange(min=0), default=30, show_default=True, help="Keep what was used since.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), help="The runs folder.  [default: runs]")
@json_option
@click.pass_obj
def cache_prune(outer: tuple[Path, bool], days: float, runs: Path | None, as_json: bool) -> None:
    """Remove what no run has used in a while; it is made again where it is needed."""
    from runner.cli.cache import prune

    entries, size = prune(must_exist(runs or outer[0]), days)  # --runs may also stand before `prune`
    if as_json or outer[1]:
        click.echo(json.dumps({"entries": entries, "bytes": size}))
    else:
        click.echo(f"{entries:,} entries removed, {size / 2**20:,.1f} MiB")
