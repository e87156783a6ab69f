"""Before any test is imported: kernels run in Triton's interpreter where there is no GPU."""

import kernel_device  # noqa: F401
