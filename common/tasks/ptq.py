def in_parts(function, x, size=256):
    """function(x), in parts of `size` images, without gradients."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(size)])


def reconstruct_weights(block, roundings, modules, x, target, cfg, progress):
    """Learn how each weight of a block is rounded, so that its output for `x` comes near `target` (BRECQ, with AdaRound).

    Args:
        block: a `Block`.
        roundings: dict of layer name -> `AdaRound`.
        modules: of the student.
        x: (N, ...), what the blocks before send, with their weights quantized.
        target: (N, ...), the full-precision block's output.
        cfg: from `config(...)`, or the command line.
        progress: called after every iteration.
    """
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings.values()], cfg.lr_rounding, fused=True)
    for index in range(cfg.weight_iterations):
        chosen = torch.randint(len(x), (cfg.ptq_batch_size,), device=x.device)
        soft = {name: functools.partial(modules[name].with_weight, weight=r()) for name, r in roundings.items()}
        output = block(x[chosen], modules | soft, quantize_activations=False)
        loss = (output - target[chosen]).square().sum(1).mean()
        share = (index / cfg.weight_iterations - 0.2) / 0.8  # the regulariser waits for a fifth of the iterations
        if share >= 0:
            loss = loss + cfg.rounding_weight * sum(r.undecided(20 - 18 * share) for r in roundings.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress()


def reconstruct_steps(block, steps, modules, x, target, cfg, progress):
    """Learn the step sizes of a block's activations. Arguments as `reconstruct_weights`; steps: dict of name ->
    `LearnedStep`; x: the full-precision input."""
    optimizer = torch.optim.Adam([step.scale for step in steps.values()], cfg.lr_step, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.step_iterations)
    for _ in range(cfg.step_iterations):
        chosen = torch.randint(len(x), (cfg.ptq_batch_size,), device=x.device)
        output = block(x[chosen], modules | steps)
        loss = (output - target[chosen]).abs().pow(2.4).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress()


def ptq(teacher, images, cfg, run):
    """Post-training quantization by block reconstruction (BRECQ; Sec. 5.2).

    The weights of one block after the other are rounded so that the block, fed by the quantized blocks before it, answers as
    the full-precision one; then the step sizes of its activations are learned on full-precision inputs. The first layer is
    rounded to nearest; it and the last have --ends-bits, and so has what follows the first.

    Args:
        teacher: a trained network that can be traced.
        images: (N, channels, H, W), normalised for it.
        cfg: from `config(...)`, or the command line.
        run: what surrounds the task; by its folder an interrupted run goes on with the next block.

    Returns:
        The quantized network, its BatchNorms folded.
    """
    teacher = copy.deepcopy(teacher).cpu().eval()
    example = probe(teacher, cfg.num_classes, cfg.image_size)
    folded = fold_batchnorm(teacher, example)
    student = quantize(folded, cfg.wbits, cfg.abits, cfg.act_placement, example=example).requires_grad_(False)
    blocks = find_blocks(student, teacher)
    full = dict(run.place(folded).named_modules())
    modules = dict(run.place(student).named_modules())
    layers = raise_ends(student, cfg)
    run.start()
    bar = Progress(total=len(blocks) * (cfg.weight_iterations + cfg.step_iterations), unit="it", disable=run.folder is None)

    def calls(block, kind):
        """The block's modules of a kind, by name, in order."""
        names = [n.target for n in block.nodes if n.op == "call_module"]
        return {name: modules[name] for name in names if isinstance(modules[name], kind)}

    def kept(stage, index, make):
        """What `make` returns, from the run's folder if an earlier run has it."""
        path = run.folder and run.folder / "parts" / f"{stage}-{index:03}.pt"
        if path and path.exists():
            return torch.load(path, map_location=run.device, weights_only=True)
        torch.manual_seed((cfg.seed * 1_000_003 + index) % 2**63)
        made = make()
        if path:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as partial:
                torch.save(made, partial)
        return made

    x_full = x = images.to(run.device, torch.float32)
    for index, block in enumerate(blocks):
        bar.set_description(f"weights {index + 1}/{len(blocks)}, {block.name}")
        target = in_parts(lambda part, block=block: block(part, full, quantize_activations=False), x_full)

        def rounded(block=block, x=x, target=target):
            layers_here = calls(block, (nn.Conv2d, nn.Linear))
            roundings = {name: AdaRound(m.weight, m.bits).to(run.device) for name, m in layers_here.items()}
            if list(roundings) != layers[:1]:
                reconstruct_weights(block, roundings, modules, x, target, cfg, bar.update)
            return {name: (r(hard=True).detach(), r.scale, r.zero_point) for name, r in roundings.items()}

        for name, (weight, scale, zero_point) in kept("weights", index, rounded).items():
            modules[name].pack(weight, scale, zero_point)
        x = in_parts(lambda part, block=block: block(part, modules, quantize_activations=False), x)
        x_full = target
    x_full = images.to(run.device, torch.float32)
    for index, block in enumerate(blocks):
        bar.set_description(f"activations {index + 1}/{len(blocks)}, {block.name}")
        target = in_parts(lambda part, block=block: block(part, full, quantize_activations=False), x_full)

        def stepped(block=block, x_full=x_full, target=target):
            steps = {name: LearnedStep(act.bits).to(run.device) for name, act in calls(block, QuantAct).items()}
            begin_steps(lambda: block(x_full[:64], modules | steps), steps.values())
            if steps:
                reconstruct_steps(block, steps, modules, x_full, target, cfg, bar.update)
            return {name: (step.scale.detach(), step.zero_point) for name, step in steps.items()}

        for name, values in kept("activations", index, stepped).items():
            modules[name].fix(*values)
        x_full = target
    bar.close()
    return student
