"""A model's folder from outside the run: whether it is what was written or verified, and the hash of its content."""

import os
from pathlib import Path

from srlm_mega.checkpoints_conversion.convert import PROOF
from srlm_mega.checkpoints_conversion.verify import check_verified, proven_files
from srlm_mega.errors import UserError
from srlm_mega.run.manifest import MANIFEST, digest_of, entry_of
from srlm_mega.run.run_dir import RunDir


def check_undamaged(folder: Path, needs_proof: bool = True) -> None:
    """Raise UserError, which names the file and what to do, when a file of a folder is not what was verified or, in a
    run, what its manifest says; with `needs_proof` also when it was converted and never verified. Reads every byte."""
    if verify_in_run(folder) or not (needs_proof or proven_files(folder) is not None):
        return
    try:
        check_verified(folder)
    except ValueError as error:  # checkpoints_conversion does not import UserError
        raise UserError(str(error)) from None


def verify_in_run(folder: Path) -> bool:
    """Return False for a folder that is not in the output of a run. UserError for one that differs from its manifest.
    Every byte is read."""
    for output in (folder.absolute().parent, folder.resolve().parent):  # a stage may be a link out of its run
        for root in (output.parent, output.parent.parent):  # of M2/huggingface, and of M2/sampler_weights/huggingface
            if (output / MANIFEST).is_file() and RunDir(root).config_file.is_file():
                RunDir(root).verify(str(output.relative_to(root)), quick=False)
                return True
    return False


def content_hash(folder: Path) -> str:
    """Return a hash of a folder's files, by which the model in it is known: without its proof and without what is
    hidden, such as a download's times."""
    paths = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    names = {path.relative_to(folder): path for path in paths if path != folder / PROOF}
    shown = {name: path for name, path in names.items() if not any(part.startswith(".") for part in name.parts)}
    return digest_of({str(name): entry_of(path) for name, path in shown.items()})
