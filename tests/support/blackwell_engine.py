"""Imported before Megatron: Transformer Engine on stand-ins, for a device that takes every FP8 recipe."""

from srlm_mega.tools.rehearsal.engine_stand_in import import_engine

import_engine((10, 0))
