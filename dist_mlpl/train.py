"""Owns the recipe: one rank's run, from top to bottom. Read this file first; it leads to all others."""

from __future__ import annotations

from dist_mlpl.batch import Progress
from dist_mlpl.build import epoch_order
from dist_mlpl.config import Config
from dist_mlpl.data.order import last_position
from dist_mlpl.engine import start
from dist_mlpl.profile import StepProfile
from dist_mlpl.progress import Action, Report
from dist_mlpl.run import open_run
from dist_mlpl.spans import span


def train(
    config: Config,
    report: Report,
    *,
    allow_change: bool = False,
    max_steps: int | None = None,
    is_output_logged: bool = False,
    is_profiled: bool = False,
    job: str | None = None,
) -> Progress:
    """Run or resume one training on this rank.

    Args:
        config: the run's config, the same on every rank.
        report: receives progress, and says when the run is asked to stop.
        allow_change: resume under a changed batch, schedule or length.
        max_steps: commit and return after this many steps of this attempt; None for no limit.
        is_output_logged: send what this process prints to its log in the run folder.
        is_profiled: trace some steps into the run folder.
        job: token shared by all attempts that one driver starts; None if the attempt is not restarted.

    Returns:
        Where the run stands at the end.

    Raises:
        MlplError: see `errors`; whatever was committed is kept.

    Collective: all ranks run this function with the same arguments.
    """
    world = start(config.engine)
    with (
        open_run(config, world, allow_change=allow_change, is_output_logged=is_output_logged, job=job) as run,
        StepProfile(config.run_folder, run.attempt.name, is_on=is_profiled) as profile,
    ):
        method, engine, stream, length = run.method, run.engine, run.stream, run.length
        progress = run.restore()  # epoch, samples_consumed, step, round
        run.introduce(report, progress)
        run.judge_if_due(progress, report)  # the previous epoch, if the run was interrupted before its evaluation ended
        last_step = None if max_steps is None else progress.step + max_steps
        action = Action.GO_ON

        for epoch in range(progress.epoch, config.num_epochs):
            if progress.samples_consumed == 0:  # not after a resume in the middle of an epoch
                renewed = run.renew_labels(progress, report)
                if renewed is None:
                    report.stopped(progress)
                    return progress
                progress = renewed
                method.begin_epoch(progress)
            order = epoch_order(config, run.samples, epoch)
            start_at = progress.samples_consumed
            end = last_position(start_at, global_batch=config.global_batch, num_samples=length.num_samples)
            for batch in stream.train_batches(
                order, run.store.at(progress.round), epoch=epoch, start=start_at, global_batch=config.global_batch
            ):
                with span("recall"):
                    recalled = method.recall(batch, progress)
                output = engine.train_step(batch, recalled, progress)  # micro-batches, backward, one update
                stream.stop_if_bad(output.extras["num_bad"])
                with span("observe"):
                    method.observe(batch, output)
                progress = progress.next(config.global_batch, length)
                with span("report"):
                    action = report.step(progress, output, stream.loading)
                profile.step(progress, report)
                action = Action.STOP if progress.step == last_step else action
                if progress.samples_consumed == end:
                    break  # the epoch's own commit follows
                if action or progress.due(config.save_every_steps):
                    run.commit(progress, report)
                if action is Action.STOP:
                    report.stopped(progress)
                    return progress

            progress = progress.next_epoch(length)
            run.commit(progress, report)
            if action is Action.STOP and progress.epoch < config.num_epochs:
                report.stopped(progress)
                return progress
            run.judge_if_due(progress, report)
        return progress
