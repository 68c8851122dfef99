"""The growing cache against transformers' own: the same logits to the bit, in a batch whose rows end one by one."""

from pathlib import Path

import torch
from sampler_contract import make_model
from transformers import AutoModelForCausalLM, DynamicCache

from srlm_mega.sampling.growing_cache import ROOM, growing_cache, rows_appended


def test_its_logits_are_those_of_transformers_cache(tmp_path: Path) -> None:
    make_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(3, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    ours, theirs = growing_cache(model.config), DynamicCache(config=model.config)
    with torch.inference_mode():
        for step in range(2 * ROOM + 3):
            logits, expected = (model(input_ids=ids, past_key_values=cache).logits[:, -1] for cache in (ours, theirs))
            assert torch.equal(logits, expected), f"step {step}"
            ids = logits.argmax(dim=-1)[:, None]
            if step == 0:
                for cache in (ours, theirs):
                    cache.batch_repeat_interleave(2)
                ids = ids.repeat_interleave(2, dim=0)
            if step in (3, ROOM + 1):
                kept = torch.arange(1, len(ids))
                for cache in (ours, theirs):
                    cache.batch_select_indices(kept)
                ids = ids[kept]
    layer = ours.layers[0]
    assert len(ids) == 4 and layer.get_seq_length() == 5 + 2 * ROOM + 2
    assert layer.key_room.shape[-2] >= layer.get_seq_length() and layer.keys.data_ptr() == layer.key_room.data_ptr()


def test_rows_are_appended_on_the_right() -> None:
    long, short = torch.tensor([[1, 2, 3]]), torch.tensor([[4], [5]])
    assert rows_appended(long, short, columns=1).tolist() == [[1, 2, 3], [0, 0, 4], [0, 0, 5]]
    assert rows_appended(short, long, columns=1).tolist() == [[0, 0, 4], [0, 0, 5], [1, 2, 3]]
    keys = [one[:, None, :, None].expand(-1, 2, -1, 3) for one in (short, long)]  # two heads of size 3
    both = rows_appended(*keys, columns=2)
    assert both.shape == (3, 2, 3, 3) and bool((both == both[:, :1, :, :1]).all())
    assert both[:, 0, :, 0].tolist() == [[0, 0, 4], [0, 0, 5], [1, 2, 3]]
