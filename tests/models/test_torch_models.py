"""PyTorch models: real MiniLM weights, an LSTM tagger, a CNN with a dynamic batch; compiled and torch.compile'd."""

import json

import numpy as np
import onnx
import pytest

import optc
from optc.ir import serialize

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = [pytest.mark.models, pytest.mark.xdist_group("torch")]

TEXT = "the cat sat quietly on a warm stone wall while distant trains carried grain across wide northern plains"
WORDS = TEXT.split(" ")


def sentences():
    """Fifty sentences of different lengths."""
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, size=3 + i)) + "." for i in range(50)]


@pytest.fixture(scope="module")
def minilm(model_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    config = json.loads(model_path("minilm/config.json").read_text())
    bert = transformers.BertModel(transformers.BertConfig(**config), add_pooling_layer=False)
    weights = load_file(model_path("minilm/model.safetensors"))
    missing = bert.load_state_dict(weights, strict=False).missing_keys
    assert not [key for key in missing if "position_ids" not in key]
    tokenizer = Tokenizer.from_file(str(model_path("minilm/tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    class Embedder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, ids, mask):
            hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=1)

    encoded = [torch.tensor([tokenizer.encode(text).ids]) for text in sentences()]
    return Embedder().eval(), encoded


def cosine(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_minilm_embeds_fifty_lengths_from_one_artifact(minilm):
    module, encoded = minilm
    length = torch.export.Dim("length", min=2, max=512)
    example = (encoded[5], torch.ones_like(encoded[5]))
    model = optc.compile(module, example, dynamic_shapes=({1: length}, {1: length})).model()
    assert len({ids.shape[1] for ids in encoded}) >= 40
    names = [spec.name for spec in model.inputs]
    for ids in encoded:
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = module(ids, mask)
        found = model.run(dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))[model.outputs[0].name]
        assert cosine(found, expected) >= 0.99999


def test_the_optimized_graphs_are_portable(minilm, relative_error, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch.manual_seed(0)
    embedder, encoded = minilm
    length, batch = torch.export.Dim("length", min=2, max=512), torch.export.Dim("batch")
    cases = {
        "MiniLM": (embedder, (encoded[5], torch.ones_like(encoded[5])), ({1: length}, {1: length})),
        "tagger": (Tagger().eval(), (torch.randint(0, 50, (3, 11)),), None),
        "CNN": (Cnn().eval(), (torch.randn(2, 3, 20, 24),), ({0: batch},)),
    }
    for name, (module, example, shapes) in cases.items():
        path = tmp_path / f"{name}.onnx"
        serialize.save(optc.optimize(module, example, dynamic_shapes=shapes), path)
        onnx.checker.check_model(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), example, strict=True)}
        with torch.no_grad():
            expected = module(*example).numpy()
        assert relative_error(session.run(None, feeds)[0], expected) <= 1e-4, name


def test_minilm_through_torch_compile(minilm):
    module, encoded = minilm
    compiled = torch.compile(module, backend="optc", dynamic=True)
    with torch.no_grad():
        for ids in encoded[::7]:
            mask = torch.ones_like(ids)
            assert cosine(compiled(ids, mask), module(ids, mask)) >= 0.99999


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.lstm = torch.nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.head = torch.nn.Linear(48, 7)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0])


class Cnn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(8, 16, 3, stride=2),
            torch.nn.SiLU(),
        )
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def test_an_lstm_tagger(relative_error):
    torch.manual_seed(0)
    module = Tagger().eval()
    example = (torch.randint(0, 50, (3, 11)),)
    model = optc.compile(module, example).model()
    for seed in range(3):
        ids = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = module(ids).numpy()
        found = model.run({model.inputs[0].name: ids.numpy()})[model.outputs[0].name]
        assert relative_error(found, expected) <= 1e-5


def test_a_cnn_with_a_dynamic_batch(relative_error):
    torch.manual_seed(0)
    module = Cnn().eval()
    shapes = ({0: torch.export.Dim("batch")},)
    model = optc.compile(module, (torch.randn(2, 3, 20, 24),), dynamic_shapes=shapes).model()
    for batch in (1, 2, 9):
        x = torch.randn(batch, 3, 20, 24)
        with torch.no_grad():
            expected = module(x).numpy()
        found = model.run({model.inputs[0].name: x})[model.outputs[0].name]
        assert relative_error(found, expected) <= 1e-5


class Bags(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(30, 8, mode="mean")

    def forward(self, rows, offsets):
        return self.bag(rows, offsets)


def test_bags_of_rows_between_offsets(relative_error):
    # A Loop over a sequence; offsets drawn at random would not ascend, so it is verified on those of the example.
    torch.manual_seed(0)
    module = Bags().eval()
    example = (torch.randint(0, 30, (11,)), torch.tensor([0, 4, 4, 9]))
    dynamic = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    model = optc.compile(module, example, dynamic_shapes=dynamic).model()
    for rows, offsets in (example, (torch.arange(5), torch.tensor([0])), (torch.arange(20), torch.tensor([0, 1, 7]))):
        expected = module(rows, offsets).detach().numpy()
        names = [spec.name for spec in model.inputs]
        found = model.run(dict(zip(names, (rows.numpy(), offsets.numpy()), strict=True)))[model.outputs[0].name]
        assert relative_error(found, expected) <= 1e-6


def test_torch_compile_recompiles_when_a_weight_changes():
    torch.manual_seed(0)
    module = Cnn().eval()
    compiled = torch.compile(module, backend="optc")
    x = torch.randn(2, 3, 20, 24)
    with torch.no_grad():
        assert torch.allclose(compiled(x), module(x), atol=1e-5)
        module.head.weight.mul_(2.0)
        assert torch.allclose(compiled(x), module(x), atol=1e-5)


def test_torch_compile_refuses_to_train():
    compiled = torch.compile(Cnn().eval(), backend="optc")
    with pytest.raises(Exception, match="is for inference"):
        compiled(torch.randn(2, 3, 20, 24))
