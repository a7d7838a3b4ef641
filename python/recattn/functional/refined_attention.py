def refined_attention(*args, **kwargs):
    raise NotImplementedError
