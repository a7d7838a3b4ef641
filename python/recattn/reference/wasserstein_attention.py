def wasserstein_attention(*args, **kwargs):
    raise NotImplementedError
