"""Text from a causal LM, and how long prefill and one decoded token take. Any transformers model will do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .machine import describe_machine

UNFINISHED = "\ufffd"  # what a tokenizer shows for a character of which only the first bytes have come


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No gradients, no dropout; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def check_length(model: Any, prompt_length: int, new_tokens: int) -> None:
    """Raise ValueError unless there is a new token, and room for all tokens in the model's positions."""
    if new_tokens < 1:
        raise ValueError(f"the number of new tokens must be at least 1, got {new_tokens}")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and prompt_length + new_tokens > longest:
        raise ValueError(
            f"prompt and new tokens must fit the model's {longest} positions, got {prompt_length} "
            f"and {new_tokens}"
        )


# --- text ---


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A continuation. `text` is what follows the prompt; `stopped_by` says why it ended."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    stopped_by: Literal["end_of_text", "length"]
    seconds: float


class _TextStream:
    """What `generate` hands new tokens to: passes text on as soon as later tokens cannot change it.

    Everything is decoded again for each token, because some tokenizers drop a space at the start of what they
    decode.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._token_ids: list[int] = []
        self._num_shown = -1  # characters; -1 until the prompt has come

    def put(self, token_ids: Tensor) -> None:
        self._token_ids += token_ids.flatten().tolist()
        text = _decode(self._tokenizer, self._token_ids)
        if self._num_shown < 0:
            self._num_shown = len(text)
        elif not text.endswith(UNFINISHED):
            self._show(text)

    def end(self) -> None:
        self._show(_decode(self._tokenizer, self._token_ids))

    def _show(self, text: str) -> None:
        if len(text) > self._num_shown:
            self._on_text(text[self._num_shown :])
            self._num_shown = len(text)


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    static_cache: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt`.

    Args:
        model: a transformers causal LM.
        tokenizer: the model's tokenizer.
        max_new_tokens: the continuation ends here if no end-of-text token comes before.
        temperature: 0 takes the most likely token; above, tokens are drawn from softmax(logits / temperature)
            over the whole vocabulary.
        seed: of the draws. The caller's random state is left as it was.
        static_cache: reserve keys and values for the whole length at once instead of growing them.
        on_text: called with each piece of text as it comes; the pieces join to the continuation.

    Raises:
        ValueError: the prompt has no tokens, or is too long for the model with its continuation, or
            `temperature` is negative.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}")
    check_length(model, prompt_tokens, max_new_tokens)

    started = time.perf_counter()
    cuda_devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=cuda_devices):
        torch.manual_seed(seed)
        token_ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            **_sampling(temperature),
            pad_token_id=_pad_token_id(model, tokenizer),
            cache_implementation="static" if static_cache else None,
            streamer=_TextStream(tokenizer, on_text) if on_text else None,
        )[0].tolist()
    seconds = time.perf_counter() - started

    new_tokens = len(token_ids) - prompt_tokens
    ended = token_ids[-1] in _end_token_ids(model)
    return Generation(
        prompt=prompt,
        text=_decode(tokenizer, token_ids)[len(_decode(tokenizer, token_ids[:prompt_tokens])) :],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        stopped_by="end_of_text" if ended else "length",
        seconds=seconds,
    )


def _sampling(temperature: float) -> dict[str, Any]:
    """Arguments of generate(): greedy at 0; above, draws from the whole vocabulary."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def _end_token_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _pad_token_id(model: Any, tokenizer: Any) -> int | None:
    """One sequence is never padded, but `generate` warns when it knows no token to pad with."""
    ends = _end_token_ids(model)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else None)


# --- latency ---


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Quantiles of measured times."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """Measured times of one model. A step of `decode_s` makes one new token for every sequence."""

    prompt_length: int
    new_tokens: int
    batch_size: int
    repeats: int
    cache: Literal["dynamic", "static"]
    prefill_s: Seconds
    decode_s: Seconds
    device: str
    dtype: str
    threads: int
    machine: dict[str, Any]  # describe_machine(): versions, commit, processor

    @property
    def decode_tokens_per_s(self) -> float:
        return self.batch_size / self.decode_s.median


def measure_latency(
    model: Any,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    *,
    batch_size: int = 1,
    static_cache: bool = False,
) -> LatencyReport:
    """Time prefill and greedy decoding on random tokens, as calls of the model alone.

    One untimed run warms up. Each of `repeats` runs prefills `prompt_length` tokens, computing logits of the
    last one only, and decodes `new_tokens` steps, each timed by itself; the device has finished when a clock
    is read. Compare two models on a busy or warm machine by calling this for them in turn, not one after the
    other.
    """
    for name, value in {"prompt_length": prompt_length, "repeats": repeats, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_length(model, prompt_length, new_tokens)
    generator = torch.Generator().manual_seed(0)
    prompt_BL = torch.randint(model.config.vocab_size, (batch_size, prompt_length), generator=generator)
    prompt_BL = prompt_BL.to(model.device)

    prefill, decode = [], []
    with evaluating(model):
        list(step_seconds(model, prompt_BL, new_tokens, static_cache))
        for _ in range(repeats):
            first, *rest = step_seconds(model, prompt_BL, new_tokens, static_cache)
            prefill.append(first)
            decode += rest
    return LatencyReport(
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        cache="static" if static_cache else "dynamic",
        prefill_s=_quantiles(prefill),
        decode_s=_quantiles(decode),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        machine=describe_machine(),
    )


def step_seconds(
    model: Any, prompt_BL: Tensor, new_tokens: int, static_cache: bool = False
) -> Iterator[float]:
    """Seconds of the prefill, then of each decoded token; a step runs when its seconds are asked for.

    Raises:
        ValueError: see `cache_of`.
    """
    cache = None
    if static_cache:
        from .hf.cache import static_cache as make_cache

        cache = make_cache(model, prompt_BL.shape[1] + new_tokens)
    tokens_BL = prompt_BL
    for _ in range(1 + new_tokens):
        started = _now(model.device)
        outputs = model(input_ids=tokens_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens_BL = cache_of(model, outputs), outputs.logits[:, -1:].argmax(-1)
        yield _now(model.device) - started


def cache_of(model: Any, outputs: Any) -> Any:
    """The cache that the next step needs.

    Raises:
        ValueError: the model returned none, so that its next step would not see the tokens before.
    """
    cache = getattr(outputs, "past_key_values", None)
    if cache is None:
        raise ValueError(f"the model must decode with a cache (past_key_values), got {type(model).__name__}")
    return cache


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _quantiles(seconds: list[float]) -> Seconds:
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, median, p90 = torch.tensor(seconds, dtype=torch.float64).quantile(points).tolist()
    return Seconds(median=median, p10=p10, p90=p90)
