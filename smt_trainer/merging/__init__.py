"""Merge a delta into the files of a checkpoint, take it out again, prove that it is there.

locate       finds the tensors, or the rows of one (`MatrixRows`), that hold each matrix with blocks; `expert_files`
             those of experts, `renamed` those under other names, `tied` the copies of embeddings
Site         the blocks of one matrix in one tensor
MergePlan    a delta and its sites: checks that it fits the base, and writes it into copies of the files
side_files   whatever else lies next to the weights
verify       compares a merged checkpoint with base and delta
unmerge      gives the base back
dequantise   merges what was trained over a quantised base
"""
