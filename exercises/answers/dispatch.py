def mine(experts, x, routing):
    # (N, E): what each expert's output is multiplied by, 0 where it was not chosen
    weights = x.new_zeros(len(x), len(experts)).scatter(1, routing.experts, routing.weights.to(x.dtype))
    return sum(weights[:, i:i + 1] * expert(x) for i, expert in enumerate(experts))
