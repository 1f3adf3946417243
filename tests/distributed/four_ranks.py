"""What `tensor_parallel` checks on two ranks, on four: they have smaller parts, or none."""

from tests.distributed import tensor_parallel

RANKS = 4

check_training = tensor_parallel.check_training_equals_one_process
check_parts = tensor_parallel.check_each_rank_holds_its_part_of_a_block
check_merging = tensor_parallel.check_merging
check_dropout = tensor_parallel.check_dropout
check_files = tensor_parallel.check_files_are_those_of_one_process
check_rows_and_tables = tensor_parallel.check_rows_and_tied_tables
check_uneven_parts = tensor_parallel.check_shards_of_other_sizes
