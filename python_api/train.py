"""Training a TarFlow: a loop that can stop at any moment and go on exactly where it was, on as many
processes as there are then."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .checkpoint import save_model
from .flops import measured_peak, training_flops
from .precision import matmul_precision
from .records import MetricsLog, read_records
from .run_checkpoints import Checkpoints
from .tarflow import TarFlow
from .trainer import Trainer


def run_training(
    trainer: Trainer,
    out: Path,
    on_step: Callable[[dict], None] | None = None,
    draw: Callable[[TarFlow, int], None] | None = None,
) -> TarFlow:
    """Trains to the last step, leaving ``checkpoints``, ``metrics.jsonl`` and
    ``model.safetensors`` (averaged weights) in ``out``. Ctrl-C and SIGTERM save after the step at
    hand (with several processes, at the next record).

    Args:
        trainer: fresh, or loaded from a checkpoint. Newer checkpoints in ``out`` are removed.
        out: a directory that exists.
        on_step: called with the record of every step, for those since the last call every
            ``log_every`` steps, at checkpoints and at the end: only then the device is waited for.
        draw: called with the averaged model and the step every ``sample_every`` steps and at the
            end, by all processes.

    Returns:
        The model with averaged weights.

    Raises:
        FloatingPointError: after ten refused steps in a row.
        KeyboardInterrupt: after Ctrl-C, SystemExit(0): after SIGTERM, with the checkpoint written.
        OSError: naming the file that could not be written.
    """
    config, world, refused, unread = trainer.config, trainer.world, 0, []
    checkpoints = Checkpoints(out / "checkpoints", world, config.keep_checkpoints)
    checkpoints.begin(trainer.step_count)
    meter = _Meter(trainer)
    with (
        contextlib.closing(checkpoints),
        MetricsLog(out, trainer.step_count, world.rank == 0) as log,
        _deferred() as signals,
    ):
        while trainer.step_count < config.steps:
            unread.append(trainer.step(stop=bool(signals)))
            checkpoints.poll()
            step, stop = trainer.step_count, False
            save = step == config.steps or step % config.checkpoint_every == 0
            alone = world.size == 1 and bool(signals)
            if save or alone or step % config.log_every == 0:
                records, unread = read_records(unread, trainer.bits_offset), []
                meter.read(records)
                for record in records:
                    stop |= record.pop("stop")
                    refused = refused + 1 if record["refused"] else 0
                    due = record["step"] % config.log_every == 0 or record["step"] == config.steps
                    if record["refused"] or due:
                        log.write(record)
                    if on_step is not None:
                        on_step(record)
                    if refused == 10:
                        raise FloatingPointError(
                            f"step {record['step']}: ten steps in a row gave a loss or gradient "
                            f"that is not finite; nothing was saved since the last checkpoint; try "
                            f"a lower lr"
                        )
            stop |= alone
            if save or stop:
                trainer.save(checkpoints)
            if stop:
                checkpoints.finish()
                raise KeyboardInterrupt if signal.SIGINT in signals else SystemExit(0)
            last = step == config.steps
            due = last or (config.sample_every and step % config.sample_every == 0)
            if due and draw is not None:
                draw(trainer.averaged_model(), step)
                meter.restart()
        checkpoints.finish()
    model = trainer.averaged_model()
    if world.rank == 0:
        save_model(
            model,
            out / "model.safetensors",
            train_config=dataclasses.asdict(config),
            class_names=trainer.data.class_names,
        )
    return model


class _Meter:
    """Images a second and MFU between two readings of the records."""

    def __init__(self, trainer: Trainer):
        config, self._world = trainer.config, trainer.world
        self._batch, self._flops = config.batch_size, training_flops(trainer.model)
        self._trainer, self._peak = trainer, config.peak_tflops * 1e12
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def read(self, records: list[dict]) -> None:
        """Adds them to the records, which took from the last reading to now."""
        rate = len(records) * self._batch / (time.perf_counter() - self._start)
        if not self._peak:
            precision = self._trainer.settle_precision()
            with matmul_precision(precision):
                self._peak = measured_peak(self._trainer.device, precision)
        mfu = rate * self._flops / (self._peak * self._world.size)
        for record in records:
            record |= {"images_per_second": rate, "mfu": mfu}
        self.restart()


@contextlib.contextmanager
def _deferred():
    """Yields a list that Ctrl-C and SIGTERM fill, so that a step is never cut in two. Elsewhere
    than in the main thread, where signals can't be handled, it stays empty."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    previous = [
        signal.signal(number, lambda number, frame: received.append(number)) for number in handled
    ]
    try:
        yield received
    finally:
        for number, handler in zip(handled, previous, strict=True):
            signal.signal(number, handler)
