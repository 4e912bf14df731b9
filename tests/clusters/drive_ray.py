"""examples/ray_data.py on two actors, one of which is killed midway: IMAGES OUT WEIGHTS MARK."""

import os
import signal
import sys

import ray
import ray_data

images, out, weights, mark = sys.argv[1:]


class Dying(ray_data.Embed):
    calls = 0

    def __call__(self, batch: dict) -> dict:
        self.calls += 1
        if self.calls == 3:
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass  # one has died
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


if __name__ == "__main__":
    ray_data.Embed = Dying
    # Two actors of one core, and two cores that read; however many there are.
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20,
             _node_ip_address="127.0.0.1")  # fmt: skip
    ray_data.embed(images, out, weights, actors=2, blocks=12)
