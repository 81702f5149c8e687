"""vLLM's hook for an architecture's config: options are checked before anything is loaded."""

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from fastmmoe.engines.vllm.options import check


def checked_before(stock: type[VerifyAndUpdateConfig] | None) -> type[VerifyAndUpdateConfig]:
    """The hook of an architecture, with ours in front."""
    if stock is not None and issubclass(stock, _Checked):
        return stock

    class Checked(_Checked, stock or VerifyAndUpdateConfig):
        pass

    return Checked


class _Checked(VerifyAndUpdateConfig):
    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        check(vllm_config)
        super().verify_and_update_config(vllm_config)
