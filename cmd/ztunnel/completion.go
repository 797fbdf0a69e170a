// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/spf13/cobra"

func completionCommand() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print what a shell needs to complete ztunnel's commands and flags",
		Long: `Print what a shell needs to complete ztunnel's commands and flags. Bash needs its
package bash-completion for it.`,
		Example: `  source <(ztunnel completion bash)
  ztunnel completion bash > /etc/bash_completion.d/ztunnel
  ztunnel completion zsh > "${fpath[1]}/_ztunnel"
  ztunnel completion fish > ~/.config/fish/completions/ztunnel.fish`,
		ValidArgs: shells,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), oneOf(shells)),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			}
			return root.GenBashCompletionV2(out, true)
		},
	}
}
