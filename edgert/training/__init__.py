"""What a model needs for its accelerations, trained on its own outputs: a draft, exit heads, predictors.

The only part of edgert that needs torch and transformers (extra `train`); nothing else imports it, and
its modules import them only once `require_libraries` has found them. Training is distillation: the
teacher, any Hugging Face model that edgert converts, says for every token of a text how likely each
next token is, and the student learns to say the same.
"""

from importlib.util import find_spec

from edgert.errors import DeviceError


def require_libraries() -> None:
    """Raise DeviceError unless torch and transformers are installed."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise DeviceError(
            f"found no {' and no '.join(missing)}, which training needs and running a model does not; "
            "install them: pip install 'edgert[train]'"
        )
