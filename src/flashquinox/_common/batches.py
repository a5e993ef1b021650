def batches_by_size(sizes: dict[int, int], room: int = 0) -> list[list[int]]:
    """Batches of leaves to update together, by the numbers of the leaves. No batch is
    larger than the largest leaf, so that batching does not raise the peak memory; or
    than `room`, where memory for more elements than that may be taken."""
    batches: list[list[int]] = []
    left = 0
    for index, size in sizes.items():
        if size > left:
            batches.append([])
            left = max(room, *sizes.values())
        batches[-1].append(index)
        left -= size
    return batches
