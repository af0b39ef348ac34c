// One statistic of one run at one probe, loaded in stretches around it.

const STRETCH = 2 ** 21; // bytes that are asked for at once

// Numbers a layer has in a frame.
export function widthOf(run, level) {
  return level === "layer" ? 1 : Math.max(0, ...run.heads);
}

// `{width, values}`; undefined until it is there, null where it cannot be had.
export function frameOf(loader, source, run, name, level, probe) {
  const width = widthOf(run, level);
  const frame = run.layers.length * width;
  const stretch = Math.max(1, Math.floor(STRETCH / 4 / Math.max(1, frame)));
  const start = Math.floor(probe / stretch) * stretch;
  const stop = Math.min(start + stretch, run.steps.length);
  const { value, error } = loader.get(
    JSON.stringify(["frames", run.name, name, start]), run.revision, `frames ${run.name}`,
    async () => ({ frame, values: await source.frames(run.name, name, start, stop) }),
  );
  const at = (probe - start) * frame;
  if (value?.frame === frame && at + frame <= value.values.length) return { width, values: value.values.subarray(at, at + frame) };
  return error ? null : undefined;
}
