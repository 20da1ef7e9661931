"""The trainer in one process; several ranks are in test_numerics.py and test_faults.py."""

import copy
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_models as models
from click.testing import CliRunner
from recipes import gpt

import optc
from optc.errors import CheckpointError, InputError, TrainingError, UsageError
from optc.training import Distillation, Trainer, load_weights, plan
from optc.training.gradients import LossScaler
from optc.training.loop import Settings, fit


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def trainer_of(name="mlp", loss_fn=None, optimizer=sgd, **options):
    module, inputs, targets, loss = models.build(name, 4)
    made = plan(module, tuple(t[:2] for t in inputs), {"devices": 1, "microbatches": 2}, costs="roofline")
    return Trainer(module, loss_fn or loss, made, optimizer, **options), inputs, targets, module


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(3, 16), torch.zeros(4, 16), "2 microbatches of 2"),
        (torch.zeros(4, 16, dtype=torch.float64), torch.zeros(4, 16), "torch.float64"),
        ((torch.zeros(4, 16), torch.zeros(4, 16)), torch.zeros(4, 16), "2 inputs were given, the model has 1"),
        (torch.zeros(4, 16), torch.zeros(3, 16), "divides into 2 microbatches"),
        (torch.zeros(4, 16), "label", "targets must be tensors"),
    ],
)
def test_batches_other_than_planned_are_errors(inputs, targets, message):
    trainer = trainer_of()[0]
    with pytest.raises(InputError, match=message):
        trainer.step(inputs, targets)


def test_a_loss_that_is_no_scalar_is_an_error():
    trainer, inputs, targets, _ = trainer_of(loss_fn=lambda output, target: (output - target).square())
    with pytest.raises(UsageError, match="not a scalar"):
        trainer.step(inputs, targets)


def test_wrong_options_are_errors():
    with pytest.raises(UsageError, match="there is no precision 'int8'"):
        trainer_of(precision="int8")
    module, inputs, _, loss = models.build("mlp", 4)
    made = plan(module, inputs, {"devices": 2, "pp": 2}, costs="roofline")
    with pytest.raises(UsageError, match="this run has 1"):
        Trainer(module, loss, made, sgd)
    with pytest.raises(UsageError, match="loss_fn has 1 weights that would not be trained: weight"):
        trainer_of(loss_fn=torch.nn.PReLU())
    with pytest.raises(UsageError, match="LBFGS runs the model several times"):
        trainer_of(optimizer=torch.optim.LBFGS)
    trainer = trainer_of()[0]
    with pytest.raises(UsageError, match="no folder for checkpoints"):
        trainer.save()
    with pytest.raises(UsageError, match="no folder for checkpoints"):
        trainer.resume()


def test_the_module_is_not_changed_and_its_weights_come_back():
    trainer, inputs, targets, module = trainer_of("gpt")
    before = copy.deepcopy(module.state_dict())
    trainer.step(inputs, targets)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    state = trainer.state_dict()
    assert list(state) == list(before)
    assert torch.equal(state["head.weight"], state["wte.weight"])
    module.load_state_dict(state)


def test_clipping_scales_all_gradients():
    free, inputs, targets, _ = trainer_of()
    clipped = trainer_of(clip=0.01)[0]
    free.step(inputs, targets)
    clipped.step(inputs, targets)
    whole = torch.cat([g.flatten() for g in free.gradients().values()])
    assert clipped.norm == pytest.approx(float(whole.norm()), rel=1e-5)
    found = torch.cat([g.flatten() for g in clipped.gradients().values()])
    torch.testing.assert_close(found, whole * 0.01 / whole.norm(), rtol=1e-4, atol=1e-8)


def test_the_norm_counts_both_parts_of_complex_gradients():
    module = torch.nn.Linear(4, 4, bias=False).to(torch.complex64)
    x = torch.randn(2, 4, dtype=torch.complex64)
    made = plan(module, x, {"devices": 1, "microbatches": 1}, costs="roofline")
    trainer = Trainer(module, lambda output, _: output.abs().square().mean(), made, sgd, clip=1e9)
    trainer.step(x, x)
    assert trainer.norm == pytest.approx(float(trainer.gradients()["weight"].norm()))


def test_bfloat16_is_near_float32():
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer, inputs, targets, _ = trainer_of("gpt", precision=precision)
        losses[precision] = [trainer.step(inputs, targets) for _ in range(3)]
    # 8 bits of mantissa in products; the loss itself is in float32
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert losses["bf16"] != losses["fp32"]


def test_a_step_that_overflows_in_fp16_is_skipped():
    trainer, inputs, targets, _ = trainer_of(precision="fp16", loss_fn=lambda o, t: (o - t).square().sum() * 1e37)
    before = trainer.state_dict()
    trainer.step(inputs, targets)
    assert not math.isfinite(trainer.norm)
    after = trainer.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize(("options", "what"), [({}, "loss"), ({"clip": 1.0}, "norm of the gradients")])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(options, what):
    def loss_fn(output, target):
        # The square root has a finite value and an infinite slope at 0.
        return (output.sum() * 0).sqrt() if options else output.sum() * math.nan

    trainer, inputs, targets, module = trainer_of(loss_fn=loss_fn, **options)
    with pytest.raises(TrainingError, match=f"the {what} of step 0 is nan"):
        trainer.step(inputs, targets)
    before = module.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state_dict().items())


def test_weights_that_are_not_finite_do_not_become_a_checkpoint(tmp_path):
    trainer, inputs, targets, _ = trainer_of(loss_fn=lambda o, t: (o.sum() * 0).sqrt(), checkpoints=tmp_path)
    trainer.step(inputs, targets)
    with pytest.raises(TrainingError, match=r"after step 1 16 weights are not finite: layers\.0\.bias"):
        trainer.save()
    assert not list(tmp_path.iterdir())


def test_the_scale_of_losses_follows_overflows():
    scaler = LossScaler(initial=8.0, interval=2)
    scaler.update(False)
    assert scaler.value == 4.0
    scaler.update(True)
    scaler.update(True)
    assert scaler.value == 8.0
    other = LossScaler()
    other.restore(scaler.state())
    assert other.state() == scaler.state()


def test_masks_hold_weights_at_zero_and_survive_checkpoints(tmp_path):
    mask = torch.rand(16, 16) < 0.5
    trainer, inputs, targets, _ = trainer_of(checkpoints=tmp_path)
    trainer.set_masks({"layers.2.weight": mask})
    trainer.step(inputs, targets)
    assert (trainer.state_dict()["layers.2.weight"][~mask] == 0).all()
    trainer.save()
    resumed = trainer_of(checkpoints=tmp_path)[0]
    resumed.resume()
    resumed.step(inputs, targets)
    assert (resumed.state_dict()["layers.2.weight"][~mask] == 0).all()
    with pytest.raises(UsageError, match="no weight 'x' to mask"):
        trainer.set_masks({"x": mask})
    with pytest.raises(UsageError, match="the mask of"):
        trainer.set_masks({"layers.2.weight": mask[:2]})


def test_a_schedule_that_looks_for_a_plateau_is_given_the_loss():
    def lr_schedule(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

    trainer, inputs, targets, _ = trainer_of(lr_schedule=lr_schedule)
    trainer._scheduler.best = 0.0  # no loss is better
    trainer.step(inputs, targets)
    assert trainer.learning_rate() == 0.05


@pytest.mark.parametrize("optimizer", [sgd, torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path, optimizer):
    trainer, inputs, targets, _ = trainer_of("resnet", optimizer=optimizer, checkpoints=tmp_path)
    assert trainer.resume() is None
    trainer.step(inputs, targets)
    trainer.save({"note": 1})
    expected = [trainer.step(inputs, targets) for _ in range(2)]
    resumed = trainer_of("resnet", optimizer=optimizer, checkpoints=tmp_path)[0]
    assert resumed.resume() == {"note": 1}
    assert resumed.step_number == 1
    assert [resumed.step(inputs, targets) for _ in range(2)] == expected


def test_a_spoiled_checkpoint_is_not_read(tmp_path):
    trainer = trainer_of(checkpoints=tmp_path)[0]
    paths = []
    for step in (1, 2):
        trainer.step_number = step
        paths.append(trainer.save())
    (file,) = paths[1].glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"step-00000002 is damaged: {file.name}") as raised:
        trainer.resume()
    assert raised.value.hint == "checkpoints beside it: step-00000001"
    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(paths[1], models.MLP())
    file.unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(tmp_path, models.MLP())
    load_weights(paths[0], models.MLP())
    with pytest.raises(CheckpointError, match=r"this one lacks 2 of its weights: layers\.7"):
        load_weights(paths[0], models.MLP(depth=7))


def test_old_checkpoints_go(tmp_path):
    trainer, inputs, targets, _ = trainer_of(checkpoints=tmp_path, keep=2)
    for _ in range(4):
        trainer.step(inputs, targets)
        trainer.save()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_a_disk_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file"):
        trainer_of(checkpoints=tmp_path / "file")[0].save()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.* on rank 0"):
        trainer_of(checkpoints=tmp_path)[0].save()
    assert not list(tmp_path.glob(".step*"))  # it would keep the disk full
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        monkeypatch.undo()
        trainer_of(checkpoints=tmp_path)[0].save({"extra": {1, 2}})
    assert not (tmp_path / "latest").exists()


def test_checkpoints_that_do_not_fit_are_errors(tmp_path):
    trainer, inputs, targets, _ = trainer_of(checkpoints=tmp_path)
    trainer.step(inputs, targets)
    path = trainer.save()
    with pytest.raises(CheckpointError, match=r"belongs to another model: this one lacks 16 of its weights"):
        trainer_of("gpt", checkpoints=tmp_path)[0].resume()
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors of this model: model/layers\.8\.bias"):
        load_weights(tmp_path, models.MLP(depth=9))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_weights(tmp_path, models.MLP(width=8))
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_weights(tmp_path / "none", models.MLP())
    (path / "training.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        trainer_of(checkpoints=tmp_path)[0].resume()
    (path / "training.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer_of(checkpoints=tmp_path)[0].resume()


def test_distillation_mixes_the_teacher_and_the_targets():
    torch.manual_seed(0)
    teacher, student, x = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5), torch.randn(6, 8)
    target = torch.randint(0, 5, (6,))
    loss = Distillation(teacher, F.cross_entropy, temperature=3.0, alpha=0.7)(student(x), target, x)
    p, q = (torch.softmax(layer(x).double() / 3, -1) for layer in (teacher, student))
    soft = (p * (p.log() - q.log())).sum(-1).mean().item()
    hard = F.cross_entropy(student(x), target).item()
    assert float(loss.detach()) == pytest.approx(0.7 * 9 * soft + 0.3 * hard, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_distillation_asks_only_for_what_counts():
    teacher, student, x = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5), torch.randn(6, 8)
    unknown = torch.full((6,), -1)
    assert math.isfinite(float(Distillation(teacher, F.cross_entropy, alpha=1)(student(x), unknown, x)))
    target = torch.arange(5).repeat(2)[:6]
    alone = Distillation(torch.nn.Linear(3, 3), F.cross_entropy, alpha=0)(student(x), target, x)
    assert torch.equal(alone, F.cross_entropy(student(x), target))


def test_distillation_refuses_what_it_cannot_compare():
    with pytest.raises(UsageError, match="alpha 2"):
        Distillation(torch.nn.Linear(2, 2), F.cross_entropy, alpha=2)
    loss = Distillation(torch.nn.Linear(8, 4), F.cross_entropy)
    with pytest.raises(UsageError, match=r"the teacher's logits are \(6, 4\)"):
        loss(torch.zeros(6, 5), torch.zeros(6, dtype=torch.long), torch.zeros(6, 8))


def test_a_student_learns_in_the_trainer():
    teacher = models.MLP()
    loss = Distillation(teacher, models.mse, temperature=1.0, alpha=0.5)
    trainer, inputs, targets, _ = trainer_of(loss_fn=loss, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    losses = [trainer.step(inputs, targets) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_a_checkpoint_is_compiled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = gpt()
    made = plan(recipe.module, recipe.example_inputs, {"devices": 1}, costs="roofline")
    trainer = Trainer(recipe.module, recipe.loss_fn, made, torch.optim.AdamW, checkpoints=tmp_path / "run")
    size = made.samples() * made.microbatches
    trainer.step(*recipe.data.batch(0, 0, size, size))
    trainer.save()
    from optc.cli.compile import command

    arguments = ["recipes:gpt", "--checkpoint", "run", "-o", "model.optc"]
    assert CliRunner().invoke(command, arguments, catch_exceptions=False).exit_code == 0
    recipe.module.load_state_dict(trainer.state_dict())
    tokens = torch.randint(0, 64, (2, 8))
    model = optc.load("model.optc")
    (found,) = model.run({model.inputs[0].name: tokens.numpy()}).values()
    with torch.no_grad():
        expected = recipe.module.eval()(tokens).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_ends_with_its_step_and_a_checkpoint(tmp_path):
    recipe, before = gpt(), signal.getsignal(signal.SIGINT)
    made = plan(recipe.module, recipe.example_inputs, {"devices": 1, "microbatches": 2}, costs="roofline")
    steps = []

    def loss_fn(output, target):
        steps.append(len(steps) // 2)
        if len(steps) == 3:  # the first microbatch of the second step, once from the terminal and once from torchrun
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return models.cross_entropy(output, target)

    with pytest.raises(TrainingError, match="interrupted after step 2 of 5") as raised:
        fit(replace(recipe, loss_fn=loss_fn), made, Settings(5, checkpoints=tmp_path))
    assert raised.value.hint == "the same command goes on from there"
    assert (tmp_path / "latest").read_text() == "step-00000002"
    assert signal.getsignal(signal.SIGINT) is before
    assert fit(recipe, made, Settings(3, checkpoints=tmp_path)).step_number == 3
    with pytest.raises(CheckpointError, match="cannot write to"):  # before it trains
        fit(replace(recipe, loss_fn=lambda *_: pytest.fail("trained")), made, Settings(9, tmp_path / "latest"))


def test_errors_of_training_are_their_own_kind():
    assert issubclass(CheckpointError, TrainingError)
