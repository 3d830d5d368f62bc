"""The version of the wire contract: every job, chunk and result carries it as `v`."""

from typing import Literal, get_args

ContractVersion = Literal[1]
CONTRACT_VERSION: ContractVersion = get_args(ContractVersion)[0]
