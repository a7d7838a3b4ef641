def sink_attention(*args, **kwargs):
    raise NotImplementedError
