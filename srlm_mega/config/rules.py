"""Rules across the sections of a configuration: messages that say what does not fit together, with the arithmetic."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `Config` asks these rules, so they know its class by name only
    from srlm_mega.config import Config


def problems(config: "Config") -> list[str]:
    """Return a message for each thing that does not fit together; an empty list for a sound configuration."""
    return [
        *layout_problems(config),
        *precision_problems(config),
        *batch_problems(config),
        *data_problems(config),
        *round_problems(config),
        *sampler_problems(config),
        *comparison_problems(config),
    ]


def layout_problems(config: "Config") -> Iterator[str]:
    """Yield why the parallel layout is impossible, with the arithmetic."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, cp = parallel.virtual_pipeline_model_parallel_size or 1, parallel.context_parallel_size
    world = config.world_size
    named = "TP * PP" if cp == 1 else "TP * PP * CP"
    yield from divided("world size (launch.nodes * launch.processes_per_node)", world, named, tp * pp * cp)
    dp = parallel.data_parallel_size
    if dp is not None and tp * pp * cp * dp != world:
        yield f"{parallel.product(dp)}, but the world size is {world}"
    yield from divided("hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads)
    yield from divided("num_attention_heads", model.num_attention_heads, "num_query_groups", model.num_query_groups)
    yield from divided("num_attention_heads", model.num_attention_heads, "TP", tp)
    yield from divided("num_query_groups", model.num_query_groups, "TP", tp)
    yield from divided("ffn_hidden_size", model.ffn_hidden_size, "TP", tp)
    yield from divided("num_layers", model.num_layers, "PP * VPP" if vpp > 1 else "PP", pp * vpp)
    if vpp > 1 and pp == 1:
        yield "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1"
    if parallel.sequence_parallel and tp == 1:
        yield "sequence_parallel needs tensor_model_parallel_size > 1"
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce"
    if model.seq_length > model.max_position_embeddings:
        yield f"seq_length {model.seq_length} is above max_position_embeddings {model.max_position_embeddings}"
    scaling = model.rope_scaling
    if scaling is not None and (computed := type(scaling)(factor=scaling.factor)) != scaling:
        yield f"model.rope_scaling is {scaling!s}, and the trainer computes only {computed!s}, with any factor"


def divided(what: str, number: int, by_what: str, by: int) -> Iterator[str]:
    """Yield a message when `number` is not a multiple of `by`."""
    if number % by:
        yield f"{what} {number} is not divisible by {by_what} {by} ({number} = {number // by} * {by} + {number % by})"


def precision_problems(config: "Config") -> Iterator[str]:
    """Yield FP8 settings that contradict each other, the device or the layers, and sizes that FP8 does not support."""
    trainer, model, parallel = config.trainer, config.model, config.parallel
    if trainer.fp8 is None:
        wanted = {
            "first_last_layers_bf16": trainer.first_last_layers_bf16,
            "fp8_shadow_interval": trainer.fp8_shadow_interval is not None,
        }
        yield from (f"trainer.{name} is for FP8: set trainer.fp8 too" for name, on in wanted.items() if on)
        return
    if not trainer.bf16:
        yield "trainer.fp8 needs trainer.bf16=true"
    if trainer.device == "cpu" or model.layer_backend == "torch":
        yield (
            f"trainer.fp8={trainer.fp8} needs Transformer Engine on CUDA, not trainer.device={trainer.device} with "
            f"model.layer_backend={model.layer_backend}"
        )
    if trainer.first_last_layers_bf16 and trainer.fp8_recipe == "delayed":
        yield "first_last_layers_bf16 needs fp8_recipe tensorwise, blockwise or mxfp8: delayed scales all layers"
    per_stage = model.num_layers // parallel.pipeline_model_parallel_size
    in_bf16 = max(trainer.num_layers_at_start_in_bf16, trainer.num_layers_at_end_in_bf16)
    if trainer.first_last_layers_bf16 and in_bf16 > per_stage:
        yield (
            f"{in_bf16} layers in bf16 at one end are more than a pipeline stage has: {model.num_layers} layers / "
            f"PP {parallel.pipeline_model_parallel_size} = {per_stage}"
        )
    tp, heads = parallel.tensor_model_parallel_size, model.num_attention_heads + 2 * model.num_query_groups
    block = trainer.fp8_block
    for what, size in (
        ("hidden_size", model.hidden_size),
        ("hidden_size / TP", model.hidden_size // tp),
        ("ffn_hidden_size / TP", model.ffn_hidden_size // tp),
        ("(heads + 2 * groups) * head size / TP", heads * (model.hidden_size // model.num_attention_heads) // tp),
    ):
        if size % block:
            yield f"FP8 ({trainer.fp8_recipe}) needs multiples of {block}: {what} is {size}"


def batch_problems(config: "Config") -> Iterator[str]:
    """Yield packs that could not hold the longest sequence or pair, would have to be split, or are not made."""
    cp = config.parallel.context_parallel_size
    sections = (("pretrain", config.pretrain, 1), ("sft", config.sft, 1), ("dpo", config.dpo, 2))
    for name, section, sequences in sections:
        packed = None if section is None else section.packed_sequence_size
        longest = sequences * (config.model.seq_length - 1)
        if packed is not None and packed < longest:
            yield (
                f"{name}.packed_sequence_size {packed} does not hold the longest "
                f"{'pair' if sequences == 2 else 'sequence'}: {sequences} * (model.seq_length - 1) = "
                f"{sequences} * ({config.model.seq_length} - 1) = {longest} input positions"
            )
        if section is not None and packed is None and section.packs != "fewest":
            yield f"{name}.packs={section.packs} needs {name}.packed_sequence_size: nothing is packed without it"
        if packed is not None and cp > 1:
            yield f"{name}.packed_sequence_size and context_parallel_size {cp} do not go together: choose one"


def data_problems(config: "Config") -> Iterator[str]:
    """Yield data sources without their file, and lengths that leave no room."""
    seed_data = config.seed_data
    if seed_data.source != "toy_world" and seed_data.path is None:
        yield f"seed_data.source={seed_data.source} needs seed_data.path"
    if seed_data.source == "jsonl" and seed_data.ranked_path is None:
        yield "seed_data.source=jsonl needs seed_data.ranked_path: preferences, for EFT-eval and EFT"
    if config.builds_eft and seed_data.num_eft_sources == 0:
        yield (
            "eft.build needs seed_data.num_eft_sources above 0: the ranked replies that EFT is built from "
            "(seed_data.eft_path is for your own EFT, eft.enabled=false trains M1 on IFT alone)"
        )
    if config.builds_eft and seed_data.eft_path is not None:
        yield (
            "seed_data.eft_path has the EFT, so none is built: remove it, or "
            f"eft.build={config.eft.build} and eft.mode={config.eft.mode}"
        )
    if seed_data.eft_path is not None and seed_data.num_eft == 0:
        yield "seed_data.eft_path needs seed_data.num_eft above 0: the largest number of its examples that are used"
    if config.eft.enabled and not config.builds_eft and seed_data.source != "toy_world" and seed_data.eft_path is None:
        yield f"eft.build=false: seed_data.source={seed_data.source} has no EFT of its own (seed_data.eft_path)"
    judge = config.judge
    if judge.max_score != 5 and isinstance(judge.template, str):
        yield f"judge.max_score={judge.max_score}: judge.template={judge.template} gives 0 to 5 points: give your own"
    if config.prompts.generator == "file" and config.prompts.path is None:
        yield "prompts.generator=file needs prompts.path"
    if config.model.path is not None and config.model.tokenizer is not None:
        yield "model.tokenizer is for a model made here: that of model.path has its own in its folder"
    shots = config.prompts.shots_ift + config.prompts.shots_generated
    if config.prompts.generator == "self_instruct" and config.seed_data.num_ift < shots:
        yield f"seed_data.num_ift {config.seed_data.num_ift} is below the {shots} shots of a prompt request"
    if config.pretrain is not None and config.seed_data.num_documents == 0:
        yield "pretrain needs seed_data.num_documents > 0"
    if config.pretrain is not None and config.model.path is not None:
        yield "pretrain makes M0 from random weights: remove it or model.path"
    for name, new_tokens in (
        ("candidates", config.candidates.max_new_tokens),
        ("judge", config.judge.max_new_tokens),
        ("prompts", config.prompts.max_new_tokens),
    ):
        if new_tokens >= config.model.seq_length:
            yield (
                f"{name}.max_new_tokens {new_tokens} leaves no room for a prompt "
                f"in model.seq_length {config.model.seq_length}"
            )


def round_problems(config: "Config") -> Iterator[str]:
    """Yield options of a round that need others, or exclude them."""
    pairs, dpo = config.pairs, config.dpo
    if pairs.consistency and (dpo.loss_type != "sigmoid" or dpo.label_smoothing > 0):
        yield (
            "pairs.consistency weighs the loss dpo.loss_type=sigmoid with dpo.label_smoothing=0, "
            f"not {dpo.loss_type} with {dpo.label_smoothing}"
        )
    if dpo.eft_replay > 0 and (config.seed_data.num_eft == 0 or not config.eft.enabled):
        yield (
            f"dpo.eft_replay {dpo.eft_replay} needs EFT data: eft.enabled is {config.eft.enabled}, seed_data.num_eft "
            f"{config.seed_data.num_eft}"
        )
    wanted = {
        "pairs.rejected_from": pairs.rejected_from != "round",
        "pairs.consistency": pairs.consistency,
        "meta_judge.enabled": config.meta_judge.enabled,
    }
    asked = [name for name, on in wanted.items() if on]
    if config.judge.backend == "random":
        yield from (f"{name} needs a judge: judge.backend is random" for name in asked)
    if config.round.method == "positives_sft":
        yield from (f"{name} is for round.method=dpo" for name in asked)


def sampler_problems(config: "Config") -> Iterator[str]:
    """Yield replicas that do not fit their GPUs or nodes, and settings of another backend."""
    sampler = config.sampler
    size = sampler.devices_per_replica
    if sampler.num_devices % size:
        yield f"sampler.num_devices {sampler.num_devices} is not divisible by a replica's TP * PP = {size}"
    if not sampler.traits.splits_model and size > 1:
        yield f"sampler.backend={sampler.backend} holds a model on one device: TP * PP is {size}"
    if not sampler.traits.quantizes and sampler.quantization is not None:
        yield f"sampler.quantization={sampler.quantization} is for vllm and TensorRT-LLM: set sampler.backend"
    folders = [section for section, judge in config.pairwise_judges.items() if judge.endpoint is None]
    folders += ["early_stopping"] if config.early_stopping is not None else []
    if sampler.traits.loads_engine and folders:
        yield (
            f"{', '.join(folders)}: checkpoints and judges are sampled as Hugging Face folders, which "
            f"sampler.backend={sampler.backend} does not load: take trtllm_torch"
        )
    if size > sampler.devices_per_node and (size % sampler.devices_per_node or not sampler.slurm):
        yield (
            f"a replica of {size} GPUs on nodes of {sampler.devices_per_node} (sampler.devices_per_node) "
            "needs whole nodes and sampler.slurm=true"
        )
    if size > sampler.devices_per_node and sampler.traits.splits_model and not sampler.traits.needs_mpi:
        yield (
            f"sampler.backend={sampler.backend} splits a model over the GPUs of one node: TP * PP is {size}, "
            f"sampler.devices_per_node {sampler.devices_per_node}"
        )
    if size < sampler.devices_per_node < sampler.num_devices and sampler.devices_per_node % size:
        yield (
            f"a node's {sampler.devices_per_node} GPUs (sampler.devices_per_node) are not divisible by a replica's "
            f"TP * PP = {size}: on several nodes a replica would lie on two of them"
        )
    if sampler.num_devices > sampler.devices_per_node and not sampler.slurm:
        yield (
            f"sampler.num_devices {sampler.num_devices} are more than a node's {sampler.devices_per_node}: "
            "set sampler.slurm=true"
        )
    if sampler.python is not None and sampler.container is not None:
        yield "sampler: give python or container, not both"


def comparison_problems(config: "Config") -> Iterator[str]:
    """Yield judges and comparisons that would never be used."""
    if config.evaluation.pairwise_judge is not None and not config.evaluation.pairwise:
        yield "evaluation.pairwise_judge needs evaluation.pairwise=true"
    stopping = config.early_stopping
    if stopping is not None and "dpo" in stopping.stages and config.round.method != "dpo":
        yield f"early_stopping.stages has dpo, and round.method={config.round.method} trains by SFT: leave it out"
