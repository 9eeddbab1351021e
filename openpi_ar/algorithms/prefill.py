"""Images, prompt and known text through tower 1 in one pass."""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Float

from openpi_ar.models.cache import Cache
from openpi_ar.models.vlm import VLM, embed_tokens
from openpi_ar.types import Array, Observation, Tokens


@nnx.dataclass
class Prefill(nnx.Pytree):
    """Hidden states of tower 1 after the final norm. Those of padding are finite but meaningless.

    hidden       every token: what `model.embed` gives, then the text; None if they were not asked for.
    prompt_last  the last valid token before the text, whose logits predict the first text token.
    text         the known text's tokens, if any.
    """

    hidden: Float[Array, "B T D"] | None = nnx.data()
    prompt_last: Float[Array, "B D"] = nnx.data()
    text: Float[Array, "B _ D"] | None = nnx.data()


def prefill(
    model: VLM,
    obs: Observation,
    text: Tokens | None = None,
    *,
    image_tokens: Float[Array, "B _ D"] | None = None,
    last_only: bool = False,
) -> tuple[Prefill, Cache]:
    """Runs images, prompt and, if given, known text through tower 1.

    `image_tokens` (from `model.embed_images`) lets the vision tower be timed or reused apart. The prompt must have at
    least one valid token per row. `last_only` leaves out `hidden`: an inference form then computes the last layer for
    the few tokens that predict text, and only writes keys and values for the others.
    """
    run = model.embed(obs, image_tokens)
    stop = run.valid.shape[1]
    last = stop - 1 - jnp.argmax(run.valid[:, ::-1], axis=1)  # padding may be anywhere: search from the end
    if text is not None:
        run = run.then(embed_tokens(model, text))
    if not last_only:
        hidden, cache = model.tower.extend(run)
        prompt_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return Prefill(hidden=hidden, prompt_last=prompt_last, text=None if text is None else hidden[:, stop:]), cache
    batch, length = run.valid.shape
    tail = jnp.broadcast_to(jnp.arange(stop, length), (batch, length - stop))
    hidden, cache = model.tower.extend(run, rows=jnp.concatenate([last[:, None], tail], axis=1))
    return Prefill(hidden=None, prompt_last=hidden[:, 0], text=None if text is None else hidden[:, 1:]), cache
