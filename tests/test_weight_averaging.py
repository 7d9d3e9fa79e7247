"""Lightning's averages of a model's weights, with its defaults."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from protohead import DecoupledPrototypeHead

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own.


def test_lightnings_weight_averaging(tmp_path):
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = DecoupledPrototypeHead({"a": 4, "b": 4}, 3, cases="all")
            self.states = []

        def training_step(self, batch, _):
            return self.head.loss(*batch)

        def on_train_batch_end(self, *_):
            self.states.append({name: p.detach().clone() for name, p in self.head.named_parameters()})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5)

    torch.manual_seed(0)
    labels = torch.arange(12) % 3
    rows = torch.randn(3, 8)[labels] + 0.1 * torch.randn(12, 8)
    present = torch.tensor([[True, True], [True, False], [False, True], [True, True]] * 3)
    model = Model()
    trainer = lightning.Trainer(
        max_epochs=12,
        callbacks=[callbacks.WeightAveraging()],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(rows, present, labels), batch_size=4))
    mean = {name: torch.stack([x[name] for x in model.states]).mean(0) for name in model.states[0]}
    for name, p in model.head.named_parameters():  # At the end the model has the averaged weights.
        assert not torch.equal(p, model.states[-1][name])
        torch.testing.assert_close(p.detach(), mean[name], rtol=1e-4, atol=1e-5)
    assert model.head.seen_cases == model.head.cases
    other = DecoupledPrototypeHead({"a": 4, "b": 4}, 3, cases="all").eval()
    other.load_state_dict(model.head.state_dict())
    assert torch.equal(other(rows, present), model.head.eval()(rows, present))
    assert (other(rows, present).argmax(1) == labels).all()
