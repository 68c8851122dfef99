"""The model, its training, and the parallel layout."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, assert_never

from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from srlm_mega.checkpoints_conversion.llama import LlamaShape, RopeScaling
from srlm_mega.config.model_sizes import ModelSizes, sizes_of
from srlm_mega.config.outside_models import absence, local_folder, shape_in
from srlm_mega.config.secrets_in_values import has_credentials
from srlm_mega.config.section import Decides, Section

Precision = Literal["fp32", "bf16", "fp8"]
PackNumber = Literal["fewest", "auto"] | Annotated[int, Field(ge=1)]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
SHAPE_KEYS = {one.name for one in fields(LlamaShape)}
NUMBERS = SHAPE_KEYS - {"rope_scaling"}  # of which null is no value
FROM_FOLDER: Any = None  # the default of a number that the model's folder says, and that must be given without one


class RopeScalingConfig(Section, decides="output"):
    """Llama 3's stretching of RoPE's wavelengths (`rope_type` llama3)."""

    factor: float = Field(ge=1, description="Factor of the longest wavelengths; Llama 3.1: 8, Llama 3.2: 32.")
    low_freq_factor: float = Field(
        1.0, gt=0, description="Wavelengths above original_max_position_embeddings / this are stretched in full."
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="Wavelengths below original_max_position_embeddings / this are left as they are."
    )
    original_max_position_embeddings: int = Field(
        8192, ge=1, description="Number of positions of the model before the stretching."
    )


class ModelConfig(Section, decides="output"):
    """The base model M0 and its shape (Llama: RMSNorm, SwiGLU, RoPE, GQA, no biases). Keys of the shape that are not
    given are read from the `config.json` of `path`, those that are given must be equal to it."""

    path: Path | None = Field(
        None,
        description="Hugging Face folder of M0, or the id of a model in the local hub cache, such as org/name; null: "
        "random weights of this shape.",
    )
    allow_unverified: bool = Field(
        False, description="Accept a converted `path` that `srlm convert verify` has not verified."
    )
    tokenizer: Path | None = Field(
        None, description="SentencePiece .model, tokenizer.json or folder; null: the one in `path`, or the toy's."
    )
    chat_template: Path | Literal["auto", "llama2", "chatml", "llama3"] = Field(
        "auto",
        description="Chat format: auto (that of `path` or `tokenizer`, else llama2), one of these, or a .jinja file.",
    )
    num_layers: int = Field(FROM_FOLDER, ge=1, description="Number of transformer layers; Llama 2 70B: 80.")
    hidden_size: int = Field(FROM_FOLDER, ge=1, description="Width of the residual stream; Llama 2 70B: 8192.")
    ffn_hidden_size: int = Field(
        FROM_FOLDER, ge=1, description="Width inside the feed-forward block (SwiGLU); Llama 2 70B: 28672."
    )
    num_attention_heads: int = Field(FROM_FOLDER, ge=1, description="Number of query heads; Llama 2 70B: 64.")
    num_query_groups: int = Field(FROM_FOLDER, ge=1, description="Number of key/value heads (GQA); Llama 2 70B: 8.")
    vocab_size: int = Field(
        FROM_FOLDER, ge=1, description="Tokens of the vocabulary: rows of embedding and output layer; Llama 2: 32000."
    )
    max_position_embeddings: int = Field(
        4096, ge=1, description="Number of positions that the base model was trained for; Llama 2: 4096."
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="Epsilon added to the mean square in RMSNorm.")
    rotary_base: float = Field(10000.0, gt=0, description="Base of RoPE's wavelengths (theta); Llama 2: 10000.")
    tie_word_embeddings: bool = Field(False, description="Use the embedding as the output layer too (tied).")
    rope_scaling: RopeScalingConfig | None = Field(None, description="Llama 3's stretching of RoPE; null: none.")
    init_method_std: float = Field(0.02, gt=0, description="Standard deviation of random weights.")
    seq_length: int = Field(4096, ge=8, description="Longest sequence, prompt and response, in tokens.")
    layer_backend: Literal["auto", "transformer_engine", "torch"] = Field(
        "auto", description="Implementation of the layers in training; auto: Transformer Engine on CUDA if installed."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _of_folder(cls, given: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(given, dict):
            return build(given)
        # null stands for a number that is not given, so that an override can take one out of a preset.
        given = {key: value for key, value in given.items() if value is not None or key not in NUMBERS}
        path, found = given.get("path"), dict[str, Any]()
        if isinstance(path, str | Path):
            path = given["path"] = local_folder(Path(path))
            found = shape_in(path)
        model = build(found | given)
        values = dict(model)
        if missing := [key for key in cls.model_fields if key in NUMBERS and values[key] is None]:
            why = "" if model.path is None else f"{absence(model.path)}; "
            raise ValueError(
                f"{why}{', '.join(missing)} are not given. Set model.path to a Hugging Face model folder, whose "
                "config.json has them, or give them"
            )
        used = model.model_dump(include=SHAPE_KEYS)
        differing = [f"{key} is {found[key]}, configured {used[key]}" for key in found if found[key] != used[key]]
        if differing:
            raise ValueError(
                f"{model.path}/config.json does not have the configured shape: {'; '.join(differing)}. Leave these "
                "keys out (null in an override), or give another model.path"
            )
        return model

    @property
    def shape(self) -> LlamaShape:
        """The shape of M0 as the record that checkpoints have. ValueError when heads do not divide."""
        values = self.model_dump(include=SHAPE_KEYS)
        scaling = values.pop("rope_scaling")
        return LlamaShape(**values, rope_scaling=RopeScaling(**scaling) if scaling else None)

    @property
    def sizes(self) -> ModelSizes:
        """The sizes from which the number of weights, FLOP and bytes follow."""
        return sizes_of(self.shape)


class OptimizationConfig(Section, decides="output"):
    """Steps, batches, learning rate, Adam and dropout of one training stage. Set exactly one of `train_iters` and
    `epochs`."""

    train_iters: int | None = Field(None, ge=1, description="Number of optimizer steps.")
    epochs: int | None = Field(None, ge=1, description="Passes over the data; a last partial batch is dropped.")
    micro_batch_size: Annotated[int, Decides("layout", part="batches")] = Field(
        1, ge=1, description="Sequences (SFT) or pairs (DPO) per forward pass and rank."
    )
    packed_sequence_size: Annotated[int | None, Decides("layout", part="batches")] = Field(
        None,
        ge=1,
        description="Positions of a packed forward pass, filled with whole sequences or pairs in place of "
        "micro_batch_size; null: one padded row per sequence.",
    )
    packs: Annotated[PackNumber, Decides("layout", part="batches")] = Field(
        "fewest",
        description="Packs per step and replica, with packed_sequence_size: fewest, a number (more where they do not "
        "hold the items), or auto, as many as fill the pipeline; never more than items.",
    )
    global_batch_size: Annotated[int, Decides("output", part="batches")] = Field(
        16, ge=1, description="Sequences (SFT) or pairs (DPO) per optimizer step."
    )
    lr: float = Field(gt=0, description="Learning rate after warm-up; paper: 5.5e-6 for SFT, 1e-6 for DPO.")
    min_lr: float = Field(ge=0, description="Learning rate of the last step.")
    lr_decay_style: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Curve by which the learning rate falls from lr to min_lr."
    )
    lr_warmup_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the steps in which the learning rate rises to lr (warm-up)."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW) of all weights but norms.")
    clip_grad: float = Field(1.0, gt=0, description="Largest gradient norm; a very large number never clips.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of Adam's mean of gradients.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="Decay of Adam's mean of squared gradients.")
    adam_eps: float = Field(1e-8, gt=0, description="Epsilon added to the root of Adam's mean of squared gradients.")
    attention_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Dropout of attention weights; paper: 0.1. With both dropouts 0, DPO's first loss must be ln 2.",
    )
    hidden_dropout: float = Field(
        0.1, ge=0, lt=1, description="Dropout on what each block adds to the residual stream; paper: 0.1."
    )

    @property
    def min_items(self) -> int:
        """Fewest items from which the stage can take a step: in its epochs they fill a batch."""
        return 1 if self.epochs is None else -(-self.global_batch_size // self.epochs)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.train_iters is None) == (self.epochs is None):
            raise ValueError("set exactly one of train_iters and epochs")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class DpoConfig(OptimizationConfig, decides="output"):
    """A round's DPO: loss -log sigmoid(beta * margin), reference = the round's starting model."""

    loss_type: Literal["sigmoid", "robust", "hinge", "ipo"] = Field(
        "sigmoid",
        description="Loss by TRL's names: sigmoid (the paper's DPO; with label_smoothing cDPO), robust, hinge or ipo.",
    )
    beta: float = Field(0.1, gt=0, description="Factor of the log-ratios to the reference in the margin; paper: 0.1.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed share of pairs with swapped labels: cDPO (sigmoid), robust DPO."
    )
    rpo_alpha: float = Field(0.0, ge=0, description="Weight of the chosen response's NLL per token, added to the loss.")
    eft_replay: float = Field(
        0.0, ge=0, lt=1, description="Share of the optimizer steps that train on EFT examples by SFT."
    )

    @model_validator(mode="after")
    def _smoothed(self) -> Self:
        if self.label_smoothing > 0 and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing {self.label_smoothing} is for sigmoid and robust, not {self.loss_type}")
        if self.label_smoothing == 0 and self.loss_type == "robust":
            raise ValueError("loss_type robust needs label_smoothing > 0, the share of wrong pairs it corrects for")
        return self


class ParallelConfig(Section, decides="layout"):
    """Parallel layout, in Megatron's names: world size = tensor * pipeline * context * data."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Number of ranks that share each layer (TP).")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="Pipeline stages, each on ranks of its own (PP).")
    data_parallel_size: int | None = Field(
        None, ge=1, description="Number of replicas of the model (DP); null: what the world size leaves."
    )
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2, description="Model chunks per pipeline stage.")
    context_parallel_size: int = Field(1, ge=1, description="Ranks that each hold a part of each sequence (CP).")
    sequence_parallel: bool = Field(
        False, description="Split activations between TP's matrix products along the sequence; needs TP above 1."
    )
    use_distributed_optimizer: bool = Field(
        False, description="Split the optimizer's state over data-parallel ranks (ZeRO-1)."
    )
    overlap_grad_reduce: bool = Field(False, description="Sum gradients over ranks while the backward pass runs.")
    overlap_param_gather: bool = Field(False, description="Gather updated weights while the next forward pass runs.")

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def product(self, data_parallel_size: int) -> str:
        """Return the product of the axes in words, such as `TP 2 * PP 2 * DP 4 = 16`; CP only where it is used."""
        sizes = {
            "TP": self.tensor_model_parallel_size,
            "PP": self.pipeline_model_parallel_size,
            "CP": self.context_parallel_size,
            "DP": data_parallel_size,
        }
        factors = [f"{axis} {size}" for axis, size in sizes.items() if axis != "CP" or size > 1]
        return f"{' * '.join(factors)} = {self.model_parallel_size * data_parallel_size}"


class TrainerConfig(Section, decides="output"):
    """Device, precision, checkpoints and time limits of all training stages."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device of training; auto: CUDA if there is one."
    )
    bf16: bool = Field(False, description="bf16 compute with fp32 main gradients and master weights; false: fp32.")
    fp8: Literal["hybrid", "e4m3"] | None = Field(None, description="Format of FP8 products (Transformer Engine).")
    fp8_recipe: Fp8Recipe = Field(
        "tensorwise",
        description="Scaling of FP8; delayed: by past passes, with the first one unscaled; mxfp8: Blackwell only.",
    )
    fp8_amax_history_len: int = Field(1024, ge=1, description="Passes whose largest value sets a delayed scale.")
    first_last_layers_bf16: bool = Field(False, description="Keep the first and last layers out of FP8.")
    num_layers_at_start_in_bf16: int = Field(
        1, ge=0, description="First layers that stay in bf16, with first_last_layers_bf16."
    )
    num_layers_at_end_in_bf16: int = Field(
        1, ge=0, description="Last layers that stay in bf16, with first_last_layers_bf16."
    )
    fp8_shadow_interval: int | None = Field(
        None, ge=1, description="DPO steps between comparisons of a batch's margins in FP8 and in bf16; null: never."
    )
    fp8_shadow_threshold: float = Field(
        0.5, gt=0, description="Largest difference in beta * margin (the reward margin); above it the run stops."
    )
    recompute_granularity: Annotated[Literal["full", "selective"] | None, Decides("layout")] = Field(
        None,
        description="Activations that the backward pass recomputes: those inside the norms of plain PyTorch layers "
        "(selective), a whole layer's (full); null: none.",
    )
    save_interval: Annotated[int | None, Decides("layout")] = Field(
        100, ge=1, description="Optimizer steps between checkpoints; null: only when training is asked to stop."
    )
    keep_checkpoints: Annotated[int, Decides("layout")] = Field(
        2, ge=1, description="Number of newest checkpoints that are kept until the stage is finished."
    )
    async_save: Annotated[bool, Decides("layout")] = Field(
        False, description="Continue training while a checkpoint's files are written."
    )
    start_timeout_minutes: Annotated[float, Decides("layout")] = Field(
        30.0, gt=0, description="Longest time to load data and weights, in minutes."
    )
    step_timeout_minutes: Annotated[float, Decides("layout")] = Field(
        10.0, gt=0, description="Longest time of each part of an optimizer step, in minutes."
    )
    checkpoint_timeout_minutes: Annotated[float, Decides("layout")] = Field(
        30.0, gt=0, description="Longest time to write or read a checkpoint, in minutes."
    )
    export_timeout_minutes: Annotated[float, Decides("layout")] = Field(
        60.0, gt=0, description="Longest time to write the Hugging Face folder, in minutes."
    )

    @property
    def precision(self) -> Precision:
        """Precision of the matrix products."""
        if self.fp8 is not None:
            return "fp8"
        return "bf16" if self.bf16 else "fp32"

    @property
    def fp8_block(self) -> int:
        """What both sizes of a matrix must be a multiple of for FP8 products: values that share a scale, or 16."""
        match self.fp8_recipe:
            case "blockwise":
                return 128
            case "mxfp8":
                return 32
            case "delayed" | "tensorwise":
                return 16
            case _:
                assert_never(self.fp8_recipe)


class TrackingConfig(Section, decides="nothing"):
    """Trackers of training metrics besides metrics.jsonl; changing them changes no output."""

    tensorboard: bool = Field(True, description="Write event files to tensorboard/ in the stage's folder.")
    wandb_project: str | None = Field(None, description="Weights & Biases project (`pip install wandb`).")
    mlflow_tracking_uri: str | None = Field(None, description="MLflow server or store (`pip install mlflow`).")

    @field_validator("mlflow_tracking_uri")
    @classmethod
    def _without_credentials(cls, uri: str | None) -> str | None:
        if uri is not None and has_credentials(uri):
            raise ValueError(
                "the URI carries credentials, and the run keeps its configuration: give them by MLflow's own "
                "variables, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri
