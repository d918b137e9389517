"""flash-attn as a fake module: the real signatures and demands, with the answer computed by PyTorch.

Signatures: flash-attn 2.8.3 (`flash_attn.flash_attn_interface`) and FlashAttention 3
(`flash_attn_interface`). Each call is recorded.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F

HALF = (torch.float16, torch.bfloat16)


class FakeFlash:
    """`calls` holds one namespace per call, with the arguments by name.

    An `early` FlashAttention 3 returns the softmax's logarithms too.
    """

    def __init__(self, dtypes: tuple[torch.dtype, ...]) -> None:
        self.dtypes = dtypes
        self.early = False
        self.calls: list[SimpleNamespace] = []

    def varlen_2(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert (dropout_p, alibi_slopes, return_attn_probs, block_table) == (0, None, False, None)
        return self._varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale,
            causal,
            window_size,
            softcap,
            deterministic,
        )

    def varlen_3(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        assert (seqused_q, seqused_k, qv, attention_chunk) == (None, None, None, 0)
        attended = self._varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale,
            causal,
            window_size,
            softcap,
            deterministic,
        )
        return (attended, q.new_zeros(q.shape[1], len(q))) if self.early else attended

    def _varlen(
        self, q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size, softcap, deterministic
    ):
        self.calls.append(
            SimpleNamespace(
                q=q,
                k=k,
                v=v,
                cu=cu_q,
                max=max_q,
                scale=softmax_scale,
                causal=causal,
                window=window_size,
                softcap=softcap,
                deterministic=deterministic,
            )
        )
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in self.dtypes
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert cu_q.is_contiguous()
        assert cu_k.is_contiguous()
        assert torch.equal(cu_q, cu_k)
        lengths = cu_q.diff().tolist()
        assert int(max_q) == int(max_k) == max(lengths)
        assert sum(lengths) == len(q) == len(k) == len(v)
        assert q.shape[1] % k.shape[1] == 0
        documents = (x.split(lengths) for x in (q, k, v))
        how = (softmax_scale, causal, window_size, softcap)
        return torch.cat([_dense(*part, *how) for part in zip(*documents, strict=True)])


def _dense(q, k, v, scale, causal, window, softcap):
    """Attention of one document, [length, heads, P] each."""
    position = torch.arange(len(q))
    age = position[:, None] - position
    seen = torch.ones_like(age, dtype=torch.bool)
    if causal:
        seen &= age >= 0
    if window[0] >= 0:
        seen &= age <= window[0]
    if window[1] >= 0:
        seen &= -age <= window[1]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if softcap == 0.0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)[0].transpose(0, 1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)[0].transpose(0, 1)


def install(monkeypatch, version: int, dtypes: tuple[torch.dtype, ...] = HALF) -> FakeFlash:
    """As if flash-attn 2 or 3 were installed, for the rest of one test; the real ones take HALF only."""
    fake = FakeFlash(dtypes)
    functions = {"flash_attn_varlen_func": fake.varlen_2 if version == 2 else fake.varlen_3}
    functions |= {"flash_attn_func": _not_packed, "flash_attn_with_kvcache": _not_packed}
    names = {2: ("flash_attn", "flash_attn.flash_attn_interface"), 3: ("flash_attn_interface",)}[version]
    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    if version == 2:
        padding = ModuleType("flash_attn.bert_padding")
        vars(padding).update(pad_input=_not_packed, unpad_input=_not_packed)
        monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    return fake


def _not_packed(*args, **kwargs):
    raise AssertionError("a packed batch has neither padding nor a cache of pages")
