"""Lightning callbacks of the user's own, beside those of a run."""

from __future__ import annotations

import dataclasses

import lightning as L

import dino_xcit


class Steps(L.Callback):
    """Collects the optimizer steps that it sees, and stops the run after one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.steps: list[int] = []
        self.last = last

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.steps.append(trainer.global_step)
        if trainer.global_step == self.last:
            trainer.should_stop = True


def test_a_callback_sees_the_steps_of_the_whole_run_also_when_it_is_continued(tiny):
    first, second = Steps(last=7), Steps()
    outcome = dino_xcit.pretrain(tiny, callbacks=[first])
    assert (outcome.step, first.steps) == (7, list(range(1, 8)))
    outcome = dino_xcit.pretrain(tiny, callbacks=[second])
    assert (outcome.step, second.steps) == (12, list(range(8, 13)))


def test_callbacks_and_options_are_keywords(tmp_path, tiny):
    callback = Steps()
    options = dataclasses.asdict(dataclasses.replace(tiny, epochs=1))
    dino_xcit.pretrain(**options, callbacks=[callback])
    assert callback.steps == list(range(1, 7))
