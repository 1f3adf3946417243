"""What the tests of LoRA folders share: the real `peft` as the oracle."""

import copy
import warnings

import peft
import torch
from torch import nn

import disha
from tests.conftest import perturb
from tests.peft_models import (
    tensors_of,
)

TOKENS = torch.arange(12).view(2, 6)


class Vision(nn.Module):
    """One convolution of each dimension, with strides, paddings and a kernel that is not square."""

    def __init__(self):
        super().__init__()
        self.plane = nn.Conv2d(5, 6, (3, 2), stride=2, padding=(1, 0))
        self.line = nn.Conv1d(6, 4, 3, padding="same", bias=False)
        self.space = nn.Conv3d(1, 3, 2)
        self.point = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.line(self.plane(x).flatten(2))
        x = self.point(x[:, :, None]).transpose(1, 2).unsqueeze(-1)
        return self.space(x.expand(-1, -1, -1, -1, 3))


def served(base, folder):
    """Load a folder with peft; every parameter of its layers must come from the file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", ".*tied.*")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    kept = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert kept.keys() == tensors_of(folder).keys()
    return model


def output(model, inputs):
    found = model(inputs)
    return found.logits if hasattr(found, "logits") else found


def check_served(base, folder, ours, inputs, tolerance):
    """Compare outputs with peft's, and weights after merging on both sides."""
    theirs = served(base, folder)
    with torch.no_grad():
        expected, found = output(ours, inputs), output(theirs, inputs)
        assert not torch.allclose(expected, output(base, inputs), atol=1e-3)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    disha.merge_adapters(ours, "default")
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in ours.state_dict().items():
        if ".disha." not in name:
            torch.testing.assert_close(
                merged[name], weight, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m
            )
    disha.unmerge_adapters(ours)


def adapted(base, target="all-linear", r=4, **options):
    return perturb(disha.inject_adapters(copy.deepcopy(base), target, r, **options))
