"""Rules across the sections of a configuration, each with its arithmetic. the sections are beside it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `Config` asks these rules, so they know its class by name only
    from srlm_mega.config import Config


def problems(config: "Config") -> list[str]:
    """What does not go together, in words; empty when everything does."""
    return [
        *layout_problems(config),
        *precision_problems(config),
        *batch_problems(config),
        *data_problems(config),
        *round_problems(config),
        *sampler_problems(config),
        *comparison_problems(config),
    ]


def layout_problems(config: "Config") -> list[str]:
    """Why the parallel layout is impossible, each with its arithmetic; empty when it is possible."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, cp = parallel.virtual_pipeline_model_parallel_size or 1, parallel.context_parallel_size
    world = config.world_size
    problems = []

    def divisible(what: str, number: int, by_what: str, by: int) -> None:
        if number % by:
            problems.append(
                f"{what} {number} is not divisible by {by_what} {by} ({number} = {number // by} * {by} + {number % by})"
            )

    named = "TP * PP" if cp == 1 else "TP * PP * CP"
    divisible("world size (launch.nodes * launch.processes_per_node)", world, named, tp * pp * cp)
    dp = parallel.data_parallel_size
    if dp is not None and tp * pp * cp * dp != world:
        problems.append(f"{parallel.product(dp)}, but the world size is {world}")
    divisible("hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads)
    divisible("num_attention_heads", model.num_attention_heads, "num_query_groups", model.num_query_groups)
    divisible("num_attention_heads", model.num_attention_heads, "TP", tp)
    divisible("num_query_groups", model.num_query_groups, "TP", tp)
    divisible("ffn_hidden_size", model.ffn_hidden_size, "TP", tp)
    divisible("num_layers", model.num_layers, "PP * VPP" if vpp > 1 else "PP", pp * vpp)
    if vpp > 1 and pp == 1:
        problems.append("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
    if parallel.sequence_parallel and tp == 1:
        problems.append("sequence_parallel needs tensor_model_parallel_size > 1")
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        problems.append("overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce")
    if model.seq_length > model.max_position_embeddings:
        problems.append(
            f"seq_length {model.seq_length} is above max_position_embeddings {model.max_position_embeddings}"
        )
    return problems


def precision_problems(config: "Config") -> list[str]:
    """FP8 settings that contradict each other, the device or the layers; dimensions that FP8 does not take."""
    trainer, model, parallel = config.trainer, config.model, config.parallel
    if trainer.fp8 is None:
        wanted = {
            "first_last_layers_bf16": trainer.first_last_layers_bf16,
            "fp8_shadow_interval": trainer.fp8_shadow_interval is not None,
        }
        return [f"trainer.{name} is for FP8: set trainer.fp8 too" for name, on in wanted.items() if on]
    problems = []
    if not trainer.bf16:
        problems.append("trainer.fp8 needs trainer.bf16=true")
    if trainer.device == "cpu" or model.layer_backend == "torch":
        problems.append(
            f"trainer.fp8={trainer.fp8} needs Transformer Engine on CUDA, not trainer.device={trainer.device} with "
            f"model.layer_backend={model.layer_backend}"
        )
    if trainer.first_last_layers_bf16 and trainer.fp8_recipe == "delayed":
        problems.append("first_last_layers_bf16 needs fp8_recipe tensorwise or blockwise: delayed scales all layers")
    per_stage = model.num_layers // parallel.pipeline_model_parallel_size
    in_bf16 = max(trainer.num_layers_at_start_in_bf16, trainer.num_layers_at_end_in_bf16)
    if trainer.first_last_layers_bf16 and in_bf16 > per_stage:
        problems.append(
            f"{in_bf16} layers in bf16 at one end are more than a pipeline stage has: {model.num_layers} layers / "
            f"PP {parallel.pipeline_model_parallel_size} = {per_stage}"
        )
    tp, heads = parallel.tensor_model_parallel_size, model.num_attention_heads + 2 * model.num_query_groups
    block = 128 if trainer.fp8_recipe == "blockwise" else 16
    for what, size in (
        ("hidden_size", model.hidden_size),
        ("hidden_size / TP", model.hidden_size // tp),
        ("ffn_hidden_size / TP", model.ffn_hidden_size // tp),
        ("(heads + 2 * groups) * head size / TP", heads * (model.hidden_size // model.num_attention_heads) // tp),
    ):
        if size % block:
            problems.append(f"FP8 ({trainer.fp8_recipe}) needs multiples of {block}: {what} is {size}")
    return problems


def batch_problems(config: "Config") -> list[str]:
    """Packs that could not hold the longest item, or would have to be cut."""
    cp = config.parallel.context_parallel_size
    sections = (("pretrain", config.pretrain, 1), ("sft", config.sft, 1), ("dpo", config.dpo, 2))
    problems = []
    for name, section, sequences in sections:
        longest = sequences * (config.model.seq_length - 1)
        if section is not None and section.packed_sequence_size is not None and section.packed_sequence_size < longest:
            problems.append(
                f"{name}.packed_sequence_size {section.packed_sequence_size} does not hold the longest "
                f"{'pair' if sequences == 2 else 'sequence'}: {sequences} * (model.seq_length - 1) = "
                f"{sequences} * ({config.model.seq_length} - 1) = {longest} input positions"
            )
        if section is not None and section.packed_sequence_size is not None and cp > 1:
            problems.append(
                f"{name}.packed_sequence_size and context_parallel_size {cp} do not go together: choose one"
            )
    return problems


def data_problems(config: "Config") -> list[str]:
    """Sources without their file, and length budgets that cannot hold."""
    problems = []
    seed_data = config.seed_data
    if seed_data.source != "toy_world" and seed_data.path is None:
        problems.append(f"seed_data.source={seed_data.source} needs seed_data.path")
    if seed_data.source == "jsonl" and seed_data.ranked_path is None:
        problems.append("seed_data.source=jsonl needs seed_data.ranked_path: preferences, for EFT-eval and EFT")
    if config.builds_eft and seed_data.num_eft_sources == 0:
        problems.append(
            "eft.build needs seed_data.num_eft_sources above 0: the ranked replies that the SFT baseline judges "
            "(eft.enabled=false trains M1 on IFT alone)"
        )
    if config.eft.enabled and not config.builds_eft and seed_data.source != "toy_world":
        problems.append(f"eft.build=false: seed_data.source={seed_data.source} has no EFT of its own")
    if config.prompts.generator == "file" and config.prompts.path is None:
        problems.append("prompts.generator=file needs prompts.path")
    if config.model.path is not None and config.model.tokenizer is not None:
        problems.append(
            "model.tokenizer is for a model made here; the tokenizer of model.path is the one in its folder"
        )
    shots = config.prompts.shots_ift + config.prompts.shots_generated
    if config.prompts.generator == "self_instruct" and config.seed_data.num_ift < shots:
        problems.append(f"seed_data.num_ift {config.seed_data.num_ift} is below the {shots} shots of a prompt request")
    if config.pretrain is not None and config.seed_data.num_documents == 0:
        problems.append("pretrain needs seed_data.num_documents > 0")
    if config.pretrain is not None and config.model.path is not None:
        problems.append("pretrain makes M0 from random weights: remove it or model.path")
    for name, new_tokens in (
        ("candidates", config.candidates.max_new_tokens),
        ("judge", config.judge.max_new_tokens),
        ("prompts", config.prompts.max_new_tokens),
    ):
        if new_tokens >= config.model.seq_length:
            problems.append(
                f"{name}.max_new_tokens {new_tokens} leaves no room for a prompt "
                f"in model.seq_length {config.model.seq_length}"
            )
    return problems


def round_problems(config: "Config") -> list[str]:
    """Options of a round that need others, or exclude them."""
    pairs, dpo, problems = config.pairs, config.dpo, []
    if pairs.consistency and (dpo.loss_type != "sigmoid" or dpo.label_smoothing > 0):
        problems.append(
            "pairs.consistency weighs the loss dpo.loss_type=sigmoid with dpo.label_smoothing=0, "
            f"not {dpo.loss_type} with {dpo.label_smoothing}"
        )
    if dpo.eft_replay > 0 and (config.seed_data.num_eft == 0 or not config.eft.enabled):
        problems.append(
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
        problems += [f"{name} needs a judge: judge.backend is random" for name in asked]
    if config.round.method == "positives_sft":
        problems += [f"{name} is for round.method=dpo" for name in asked]
    return problems


def sampler_problems(config: "Config") -> list[str]:
    """Replicas that do not come out even, and settings of another backend."""
    sampler = config.sampler
    size = sampler.devices_per_replica
    problems = []
    if sampler.num_devices % size:
        problems.append(f"sampler.num_devices {sampler.num_devices} is not divisible by a replica's TP * PP = {size}")
    if not sampler.traits.splits_model and size > 1:
        problems.append(f"sampler.backend={sampler.backend} holds a model on one device: TP * PP is {size}")
    if not sampler.traits.quantizes and sampler.quantization is not None:
        problems.append(f"sampler.quantization={sampler.quantization} is for TensorRT-LLM: set sampler.backend")
    folders = [section for section, judge in config.pairwise_judges.items() if judge.endpoint is None]
    folders += ["early_stopping"] if config.early_stopping is not None else []
    if sampler.traits.loads_engine and folders:
        problems.append(
            f"{', '.join(folders)}: checkpoints and judges are sampled as Hugging Face folders, which "
            f"sampler.backend={sampler.backend} does not load: take trtllm_torch"
        )
    if size > sampler.devices_per_node and (size % sampler.devices_per_node or not sampler.slurm):
        problems.append(
            f"a replica of {size} GPUs on nodes of {sampler.devices_per_node} (sampler.devices_per_node) "
            "needs whole nodes and sampler.slurm=true"
        )
    if sampler.num_devices > sampler.devices_per_node and not sampler.slurm:
        problems.append(
            f"sampler.num_devices {sampler.num_devices} are more than a node's {sampler.devices_per_node}: "
            "set sampler.slurm=true"
        )
    if sampler.python is not None and sampler.container is not None:
        problems.append("sampler: give python or container, not both")
    return problems


def comparison_problems(config: "Config") -> list[str]:
    """Judges that nobody would ask."""
    problems = []
    if config.evaluation.pairwise_judge is not None and not config.evaluation.pairwise:
        problems.append("evaluation.pairwise_judge needs evaluation.pairwise=true")
    stopping = config.early_stopping
    if stopping is not None and "dpo" in stopping.stages and config.round.method != "dpo":
        problems.append(
            f"early_stopping.stages has dpo, and round.method={config.round.method} trains by SFT: leave it out"
        )
    return problems
