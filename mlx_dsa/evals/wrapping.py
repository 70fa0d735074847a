"""Other modules in place of a model's attention layers, to look at what these do."""

from contextlib import contextmanager


@contextmanager
def wrapping(model, wrappers):
    """Put modules in place of attention layers until the context ends.

    Args:
        model: patched or not.
        wrappers (dict): layer number to the module that is called in its place.
    """
    own = {i: model.layers[i].self_attn for i in wrappers}
    try:
        for i, wrapper in wrappers.items():
            model.layers[i].self_attn = wrapper
        yield
    finally:
        for i, attention in own.items():
            model.layers[i].self_attn = attention
