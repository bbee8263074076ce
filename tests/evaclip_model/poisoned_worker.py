"""The training worker, with a model whose features of captions that hold a 9 are no numbers."""

import sys

import torch

from evaclip_model.model.clip import EvaClip
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.worker import main

(NINE,) = set(tokenize(["9"])[0].tolist()) - set(tokenize(["0"])[0].tolist())
sound = EvaClip.encode_text


def poisoned(self, tokens, normalize=False):
    features = sound(self, tokens, normalize)
    return features.masked_fill((tokens == NINE).any(1)[:, None], torch.nan)


EvaClip.encode_text = poisoned
sys.exit(main(sys.argv[1:]))
