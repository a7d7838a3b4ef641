def validate(*args, **kwargs):
    raise NotImplementedError
