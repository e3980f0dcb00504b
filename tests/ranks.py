"""A stage on several gloo processes, started as torchrun starts them."""

import multiprocessing
import os
import socket

import torch


def _alone(main, argv):
    """A forked OpenMP with several threads waits forever for those that stayed with the parent, if
    a test before has used them there."""
    torch.set_num_threads(1)
    main(argv)


def _rank(main, argv, rank, world, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    _alone(main, argv)


def start(main, argv, world):
    """Forked: that spares importing torch again, and what a test has patched stays patched."""
    fork = multiprocessing.get_context("fork")
    if world == 1:
        ranks = [fork.Process(target=_alone, args=(main, argv))]
    else:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        ranks = [
            fork.Process(target=_rank, args=(main, argv, r, world, port)) for r in range(world)
        ]
    for p in ranks:
        p.start()
    return ranks


def on_ranks(main, argv, world, code=0):
    ranks = start(main, argv, world)
    for p in ranks:
        p.join(240)
    assert [p.exitcode for p in ranks] == [code] * world
