"""The study's tables as text cells, the same for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conadv.report import table
from conadv.report.stats import Stat
from conadv.report.study import answers, probes, sharpness
from conadv.report.study.answers import Mark
from conadv.report.study.contrast import differences
from conadv.report.study.cost import cost, equal_cost, unit
from conadv.report.study.figures import axis_value
from conadv.report.study.sweep import Cell, Study, Trial


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first ``texts`` columns are words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Mark]]
    texts: int = 2


def _row(*cells: str | Mark) -> list[Mark]:
    return [cell if isinstance(cell, Mark) else Mark(cell) for cell in cells]


def _batch_head(study: Study) -> str:
    return "batch" if study.axis == "global_batch_size" else study.axis


def _ordered(study: Study) -> list[Cell]:
    return [cell for x in study.points for cell in study.at(x)]


def accuracy(study: Study) -> Table:
    """Test accuracy, train accuracy and the gap of every cell."""
    head = [
        _batch_head(study),
        "arm",
        "seeds",
        "test accuracy, %",
        "train accuracy, %",
        "gap, points",
        "test loss",
    ]
    robust = any(cell.stat("robust_accuracy") for cell in study.cells)
    rows = []
    for cell in _ordered(study):
        row = _row(
            axis_value(study, cell.x),
            cell.line,
            seeds(cell),
            answers.percent(cell),
            table.percent(cell.stat("train_accuracy")),
            table.percent(cell.gap),
            _plain(cell.stat("test_loss")),
        )
        rows.append(row + (_row(table.percent(cell.stat("robust_accuracy"))) if robust else []))
    return Table(head + (["robust accuracy, %"] if robust else []), rows)


def seeds(cell: Cell) -> str:
    done = len(cell.finished)
    return f"{done}" if done == cell.planned else f"{done} of {cell.planned}"


def _plain(value: Stat | None) -> str:
    if value is None:
        return table.NONE
    return f"{value.mean:.3g}" + ("" if value.std is None else f" ± {value.std:.2g}")


def contrasts(study: Study) -> Table:
    """Every difference with its interval, p and Holm's adjusted p."""
    head = [_batch_head(study), "arm", "minus", "pairs", "points [95\u00a0%]", "p", "p, Holm"]
    rows = [
        _row(
            axis_value(study, found.cell.x),
            found.cell.line,
            found.reference.line,
            str(found.difference.n),
            Mark(found.text, found.difference.verdict),
            p_value(found.difference.p),
            p_value(found.adjusted),
        )
        for found in differences(study)
    ]
    return Table(head, rows, texts=3)


def p_value(p: float | None) -> str:
    return table.NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def costs(study: Study) -> Table:
    """Gradient images and seconds of every cell, and what else could be had for it."""
    head = [
        *(
            _batch_head(study),
            "arm",
            "gradient images per clean image",
            f"gradient images of the whole training, {unit(study)[1]}",
        ),
        *(
            "step time (×\u00a0baseline)",
            "training time",
            "best without attack at no more total cost",
        ),
    ]
    return Table(head, [_cost_row(study, cell) for cell in _ordered(study)])


def _cost_row(study: Study, cell: Cell) -> list[Mark]:
    own = cost(cell)
    rival = equal_cost(study, cell) if cell.attacks else None
    return _row(
        axis_value(study, cell.x),
        cell.line,
        table.NONE if own.per_image is None else f"{own.per_image:.3g}",
        table.NONE if own.total is None else f"{own.total / unit(study)[0]:.3g}",
        _step_time(study, cell),
        table.NONE if own.seconds is None else table.duration(own.seconds),
        table.NONE if rival is None else answers.equal_mark(rival),
    )


def _step_time(study: Study, cell: Cell) -> str:
    own = cost(cell).step_seconds
    base = next(
        (cost(other).step_seconds for other in study.at(cell.x) if other.arm == study.baseline),
        None,
    )
    if own is None:
        return table.NONE
    return f"{table.duration(own)} ({own / base:.2f}×)" if base else table.duration(own)


def tuning(study: Study) -> Table:
    """A row per tuned cell: every trial with its mean validation accuracy, and the choice."""
    head = [
        _batch_head(study),
        "arm",
        "validation accuracy of every trial, %",
        "chosen",
        "runs",
        "choice is",
    ]
    rows = [
        _row(
            axis_value(study, cell.x),
            cell.line,
            " · ".join(map(_trial, cell.trials)),
            answers.setting_words(cell.chosen),
            str(sum(len(trial.validation) for trial in cell.trials)),
            _where(cell),
        )
        for cell in _ordered(study)
        if cell.trials
    ]
    return Table(head, rows, texts=3)


def _where(cell: Cell) -> str:
    """Which settings are at the edge of what was tried; "inside" speaks of those with three values and more."""
    if cell.at_edge:
        return f"{answers.short(cell.at_edge)} at the edge"
    return (
        f"inside (but two values of {answers.short(cell.only_edges)})"
        if cell.only_edges
        else "inside"
    )


def _trial(trial: Trial) -> str:
    result = "failed" if trial.mean is None else f"{100 * trial.mean:.2f}"
    return f"{answers.setting_words(trial.settings)}: {result}"


def sharp(study: Study) -> Table:
    """What `conadv analyze` found, at every cell that has an analysis."""
    cells = [cell for cell in _ordered(study) if sharpness.measured(cell)]
    head = [
        _batch_head(study),
        "arm",
        "seeds",
        "test accuracy, %",
        *(measure.title for measure in sharpness.MEASURES),
    ]
    rows = [
        _row(
            axis_value(study, cell.x),
            cell.line,
            str(len(sharpness.measured(cell))),
            answers.percent(cell),
            *(_plain(sharpness.statistic(cell, measure)) for measure in sharpness.MEASURES),
        )
        for cell in cells
    ]
    return Table(head, rows)


def staleness(study: Study) -> Table:
    """What the probe found on every arm's way: a row per tau and predictor, over the phases; means over the runs."""
    phases = list(
        dict.fromkeys(phase for cell in probes.probed(study.cells) for phase in probes.phases(cell))
    )
    _, increase, error = probes.MEASURES
    head = ["arm", "tau", "predictor"]
    for measure in (increase, error):
        head += [
            f"{measure.title.partition(chr(10))[0].split(',')[0]}, {phase}" for phase in phases
        ]
    rows = [
        _row(
            cell.line,
            str(tau),
            predictor,
            *(
                _share(probes.average(cell, measure, predictor, tau, p))
                for measure in (increase, error)
                for p in phases
            ),
        )
        for cell in probes.probed(_ordered(study))
        for predictor in probes.predictors(cell)
        for tau in probes.taus(cell, predictor)
        if predictor != probes.CURRENT
    ]
    return Table(
        head,
        sorted(rows, key=lambda row: (study.lines.index(row[0].text), int(row[1].text))),
        texts=3,
    )


def _share(found: probes.Point | None) -> str:
    return table.NONE if found is None else f"{100 * found.mean:.0f}\u00a0%"
