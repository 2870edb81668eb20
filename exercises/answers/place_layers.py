# layer 0: the first MLP that can know the letter before
MOE_LAYERS = (0, 2)
