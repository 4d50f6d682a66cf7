"""What images are good for: one module per cited paper, each with its flags, its declared choices and one `compress`."""

from common.tasks import kd, prune, ptq, qat

TASKS = {"ptq": ptq, "qat": qat, "prune": prune, "kd": kd}
