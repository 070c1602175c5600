"""A tiny random Whisper's folder as a server takes it, and what models of its adapters' own say."""

import io
import string
import wave
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

from tests import zoo
from tests.hosts.vllm.engine import SAMPLES

LOUDEST = 2**15 - 1

SPECIAL = ("startoftranscript", "en", "transcribe", "translate", "prev", "notimestamps")
PROMPT = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
"""What vLLM's server has Whisper begin with."""

MARGIN = 1e-4
"""So far is the best token from the next: rounding is far below."""

SETTINGS = {
    "d_model": 128,  # vLLM's attention on a CPU takes heads of 32 and more
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 1,
}

WEIGHTS = {
    "conv1": 0.3,
    "conv2": 0.1,
    "encoder_attn.q_proj": 0.3,
    "encoder_attn.k_proj": 0.3,
    "encoder_attn.out_proj": 0.2,
    "decoder.embed_positions": 4.0,
    "embed_tokens": 0.3,
}
"""The standard deviations of what else would answer any audio with the same tokens."""


def save_tiny_whisper(folder: Path) -> nn.Module:
    """Write a model's folder, with a tokenizer of single letters, and return the model."""
    tokens = ["<|endoftext|>", *(f"<|{name}|>" for name in SPECIAL)]
    vocabulary = {token: i for i, token in enumerate([*tokens, *string.printable[:94]])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], pad_token=tokens[0])
    tokenizer.add_special_tokens({"additional_special_tokens": tokens[1:]})
    extractor = WhisperFeatureExtractor(feature_size=SETTINGS["num_mel_bins"], chunk_length=1)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    model = zoo.build("Whisper", vocab_size=len(vocabulary), **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        for part, std in WEIGHTS.items():
            if part in name and parameter.ndim > 1:
                parameter.normal_(std=std, generator=generator)
    model.generation_config.max_length = SETTINGS["max_target_positions"]
    model.save_pretrained(folder)
    return model


def sound(seed: int, samples: int = SAMPLES) -> Tensor:
    """Audio, `[samples]`, of at most the second that the model takes at once: tones in noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / SAMPLES
    tones = torch.rand(4, 2, generator=generator) * torch.tensor([[3000.0, 0.2]])
    waves = [size * torch.sin(2 * torch.pi * pitch * time) for pitch, size in tones]
    mixed = sum(waves) + 0.02 * torch.randn(samples, generator=generator)
    return (LOUDEST * mixed.clamp(-1, 1)).round() / (LOUDEST + 1)  # as 16 bits hold it


def as_wav(audio: Tensor) -> bytes:
    """A file of audio, which loses nothing of it."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(SAMPLES)
        written.writeframes((audio * (LOUDEST + 1)).short().numpy().astype("<i2").tobytes())
    return file.getvalue()


class Listener:
    """A model of one adapter's own, as it transcribes greedily."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model = model
        self.extractor = WhisperFeatureExtractor.from_pretrained(folder)

    def transcribe(
        self, audio: Tensor, prompt: list[int], count: int, end: int | None = None
    ) -> tuple[list[int], list[float]]:
        """Up to `count` tokens after a prompt, or up to the end, and their log-probabilities.

        Asserts that no choice is a near tie, which says nothing of another computation.
        """
        features = self.extractor(audio.numpy(), sampling_rate=SAMPLES, return_tensors="pt")
        heard = self.model.get_encoder()(features["input_features"])
        tokens: list[int] = []
        scores = []
        while len(tokens) < count and (not tokens or tokens[-1] != end):
            ids = torch.tensor([prompt + tokens])
            logits = self.model(encoder_outputs=heard, decoder_input_ids=ids).logits[0, -1]
            first, second = logits.topk(2).values.tolist()
            assert first - second > MARGIN
            tokens.append(int(logits.argmax()))
            scores.append(logits.log_softmax(-1).max().item())
        return tokens, scores
