def lrea_absorb(*args, **kwargs):
    raise NotImplementedError


def lrea_absorbed_attention(*args, **kwargs):
    raise NotImplementedError


def lrea_attention(*args, **kwargs):
    raise NotImplementedError


def lrea_compress(*args, **kwargs):
    raise NotImplementedError


def lrea_nonnegativity_loss(*args, **kwargs):
    raise NotImplementedError
